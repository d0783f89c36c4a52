"""Statistics and metrics of any set of images: files, samples on disk, or drawn from a model as they are measured."""
