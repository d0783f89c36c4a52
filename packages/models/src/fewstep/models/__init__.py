"""UNet and DiT denoisers with class, text and guidance-weight conditioning."""
