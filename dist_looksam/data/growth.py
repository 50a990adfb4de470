"""Images that grow during training: progressive learning (Tan, Le 2021, arXiv:2104.00298)."""

from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Sides of training images, from `first` to `last` pixels in steps of a patch, each for an
    equal part of the run's `steps`."""

    first: int
    last: int
    patch: int
    steps: int

    def __post_init__(self) -> None:
        """ConfigError if there are no such sides, or fewer steps than sides."""
        if self.first % self.patch or not 0 < self.first < self.last:
            raise ConfigError(
                f"image_size_from must be a multiple of the model's patch of {self.patch} below "
                f"image_size, which is {self.last}, got {self.first}; use one, or leave it out."
            )
        if self.steps < self.num_sides:
            raise ConfigError(
                f"steps must be at least the {self.num_sides} image sizes from {self.first} to "
                f"{self.last} with image_size_from, got {self.steps}; train longer."
            )

    @property
    def num_sides(self) -> int:
        return (self.last - self.first) // self.patch + 1

    def shapes(self, last: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        """(channels, height, width) of the images at each size; `last`: at the last one."""
        return [(last[0], side, side) for side in range(self.first, self.last + 1, self.patch)]

    def side(self, step: int) -> int:
        """Height and width of the images of a step, in pixels."""
        part = min(step, self.steps - 1) * self.num_sides // self.steps
        return self.first + part * self.patch
