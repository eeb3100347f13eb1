"""The parts of `data` that are lists of sections: filters, and sources with weights."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Image sizes [height, width] of the paper (appendix).
PAPERS_BUCKETS = ((448, 832), (512, 768), (512, 704), (640, 640), (576, 640), (640, 576), (704, 512), (768, 512), (832, 448))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Filter(Section):
    """A rule on one column: what the json or parquet of the samples has, or width, height, short_side, pixels, ratio."""

    column: str = Field(max_length=64, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_. -]*$")
    min: float | None = None
    max: float | None = None
    words: tuple[str, ...] = Field((), description="the column must be one of these, for columns of words")
    on_missing: Literal["keep", "drop", "error"] = Field("error", description="what becomes of samples without a value")

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if self.min is None and self.max is None and not self.words:
            raise ValueError(f"data.filters: the filter on {self.column!r} asks for nothing; give it min, max or words")
        return self

    def describe(self) -> str:
        """Return the rule in words."""
        bounds = [f"{sign} {bound:g}" for sign, bound in ((">=", self.min), ("<=", self.max)) if bound is not None]
        return f"{self.column} {' and '.join([*bounds, *([f'in {list(self.words)}'] if self.words else [])])}"


class Source(Section):
    """Shards that are drawn from with a weight, relative to those of the other sources."""

    shards: tuple[str, ...] = Field(min_length=1)
    weight: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _one_pattern(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("shards"), str):
            return {**tree, "shards": [tree["shards"]]}
        return tree


def generated_buckets(resolution: int, step: int = 64, max_ratio: float = 2.0) -> tuple[tuple[int, int], ...]:
    """Return image sizes (height, width), multiples of `step`, of about resolution x resolution pixels, none with more.

    Of each height that leaves a ratio of at most `max_ratio` there is one, as wide as fits; from the widest to the highest.
    ValueError: `resolution` is below `step`.
    """
    if resolution < step:
        raise ValueError(f"image.buckets: a resolution of {resolution} is below {step}, the step between sizes")
    area, found = resolution * resolution, set()
    for side in range(step, int(resolution * max_ratio) + 1, step):
        other = area // side // step * step
        if other and max(side, other) <= max_ratio * min(side, other):
            found |= {(side, other), (other, side)}
    return tuple(sorted(found))
