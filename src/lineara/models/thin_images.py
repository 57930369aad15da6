"""The input of torchvision's detectors, for images of any shape."""

from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform


class TransformOfAnyShape(GeneralizedRCNNTransform):
    """torchvision's, but for images so long and thin that it would leave less than a pixel of their short side.

    Those keep one pixel there. All others are resized as torchvision does it, to the same numbers.
    """

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        height, width = image.shape[-2:]
        short, long = sorted((height, width))
        scale = min(min(self.min_size) / short, self.max_size / long)  # type: ignore[arg-type]
        if self.fixed_size is not None or short * scale >= 1:
            return super().resize(image, target)
        self.fixed_size = (max(int(width * scale), 1), max(int(height * scale), 1))
        try:
            return super().resize(image, target)
        finally:
            self.fixed_size = None
