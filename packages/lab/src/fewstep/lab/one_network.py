"""What the methods share that train one network of the lab's own, all of it, with one optimiser."""

from typing import Any

from torch import nn


class OneNetwork:
    """`networks`, `param_groups` and `active` of a method for `fewstep.lab.train`; its optimiser is named `name`."""

    def __init__(self, name: str, network: nn.Module):
        self.networks: dict[str, nn.Module] = {name: network}

    def param_groups(self) -> dict[str, list[dict[str, Any]]]:
        """One optimiser for everything."""
        return {name: [{"params": list(network.parameters())}] for name, network in self.networks.items()}

    def active(self, step: int) -> str:
        """The only optimiser."""
        (name,) = self.networks
        return name
