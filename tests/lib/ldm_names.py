"""Names of Stable Diffusion 2's tensors in the original LDM code.

Tests of reading such files compare with these names, which are written independently of the package.
"""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_key(name: str, layers: int, attention: tuple[bool, ...]) -> str:
    """Translate the name of a parameter from diffusers' U-Net to the original LDM code.

    Args:
        name: the name in diffusers.
        layers: number of residual blocks per U-Net level.
        attention: for each U-Net level, whether it has transformer blocks.
    """
    owner, _, leaf = name.rpartition(".")
    if owner in _OUTER:
        return f"{_OUTER[owner]}.{leaf}"
    part, _, rest = name.partition(".")
    if part == "mid_block":
        kind, index, inner = rest.split(".", 2)
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{_inner(kind, inner)}"
    level, kind, index, inner = rest.split(".", 3)
    i, j = int(level), int(index)
    if part == "down_blocks":
        block = 1 + i * (layers + 1) + (layers if kind == "downsamplers" else j)
        place = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[kind]
        return f"input_blocks.{block}.{place}.{_inner(kind, inner)}"
    block = i * (layers + 1) + (layers if kind == "upsamplers" else j)
    after = 2 if attention[len(attention) - 1 - i] else 1
    place = {"resnets": "0", "attentions": "1", "upsamplers": f"{after}.conv"}[kind]
    return f"output_blocks.{block}.{place}.{_inner(kind, inner)}"


def _inner(kind: str, inner: str) -> str:
    if kind == "resnets":
        owner, _, leaf = inner.rpartition(".")
        return f"{_RESNET[owner]}.{leaf}"
    return inner.removeprefix("conv.") if kind in ("downsamplers", "upsamplers") else inner
