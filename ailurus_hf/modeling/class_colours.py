"""The palette of a configuration: a colour for each class, and no other number of them."""

import logging
from typing import Any, Self

logger = logging.getLogger(__name__)


class ClassColoursMixin:
    """For configurations with `num_labels` classes and a `palette`."""

    palette: Any
    num_labels: int

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """As in `PreTrainedConfig`; `from_pretrained` ends here.

        A stored palette of another number of classes than `num_labels` or `id2label` ask for is left out with a
        warning: the names of its classes go too.

        Raises:
            ValueError: the palette that is given or stored does not fit the classes that are.
        """
        names, palette = kwargs.get("id2label"), config_dict.get("palette")
        number = kwargs.get("num_labels") if names is None else len(names)
        if palette is not None and number is not None and len(palette) != number:
            config_dict = {**config_dict, "palette": None}
            if kwargs.get("palette") is None:
                logger.warning(
                    "left the palette out: it has %d colours, and %d classes are asked for; palette=[[R, G, B], ...] "
                    "gives them others",
                    len(palette),
                    number,
                )
        config: Self = super().from_dict(config_dict, **kwargs)
        # transformers sets what is given by name one by one, unchecked.
        loaded = config[0] if isinstance(config, tuple) else config
        loaded.check_palette()
        return config

    def check_palette(self) -> None:
        """Check that there is a colour for each class, of three whole numbers from 0 to 255, or no palette.

        Raises:
            ValueError: there is not.
        """
        if self.palette is None:
            return
        if len(self.palette) != self.num_labels:
            raise ValueError(
                f"palette must have a colour for each of the num_labels={self.num_labels} classes, "
                f"got {len(self.palette)}"
            )
        for colour in self.palette:
            if len(colour) != 3 or not all(value == int(value) and 0 <= value <= 255 for value in colour):
                raise ValueError(f"palette must hold colours of three whole numbers from 0 to 255, got {list(colour)}")
