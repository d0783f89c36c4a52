"""Groups that an experiment's defaults choose from; a folder for hydra to find, no code."""
