"""Architectures: of images, of texts, of attention alone, and of Bayesian regression."""

MODELS = {
    "mlp": "two hidden ReLU layers of 256 units; the first linear layer's gradient holds the image in closed form",
    "lenet": "DLG's LeNet (Zhu et al. 2019, https://arxiv.org/abs/1906.08935)",
    "convnet": "three ReLU convolutions (32, 64, 64), two poolings, a linear layer, and no BatchNorm",
    "resnet20": "ResNet-20 for small images (He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2)",
    "vit": "a small vision transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929)",
    "softmax": "softmax regression without biases, at zero weights",
}
"""Models of images by name, in one line each."""
