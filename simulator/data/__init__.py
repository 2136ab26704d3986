"""Images, texts and tables, and who holds which of them."""

DATASETS = {
    "photos": "pieces of eight colour photographs that come with scikit-image; a class is a photograph",
    "cifar10": "CIFAR-10: cifar10*.npz in the data root, else torchvision's download",
}
"""Named datasets of images, in one line each. A folder, a .zip or an .npz of one's own is a dataset too."""
