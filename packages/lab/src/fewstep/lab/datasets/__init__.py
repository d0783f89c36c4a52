"""Data sets in files: MNIST and CIFAR-10, folders of images, WebDataset shards; how they are found and read."""
