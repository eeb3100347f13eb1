"""Rules that depend on a parameter's name: which parameters have weight decay, and which parameters Muon updates."""

from raphael_dist.model.routing import gate_kind

# Small layers, or the first and the last one: AdamW updates them.
_NOT_HIDDEN = {"conv_in", "conv_out", "time_embedding"}


def decays(name: str) -> bool:
    """Return whether weight decay (optim.weight_decay) applies to the parameter `name`.

    Weight decay applies to matrices and convolution kernels, but not to norms, biases and gates. This function looks at the
    name, because the shape is not sufficient: biases of stacked experts [K, F] have two axes, and ZeRO's flattened
    parameters have one.
    """
    owner, _, leaf = name.rpartition(".")
    norm = owner.rpartition(".")[2].removeprefix("conv_").startswith("norm")
    return leaf.split("_lora_")[0] in ("weight", "w1", "w2") and not norm and gate_kind(name) is None


def is_hidden_matrix(name: str) -> bool:
    """Return whether Muon updates the parameter `name`: weights of linear layers, experts and convolutions in hidden layers.

    AdamW updates the first and the last layer, the timestep embedding, norms, biases and gates.
    """
    return decays(name) and _NOT_HIDDEN.isdisjoint(name.split("."))
