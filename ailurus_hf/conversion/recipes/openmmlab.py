"""What the configs of OpenMMLab's mmsegmentation, and of NVlabs' SegFormer made with it, say beside the layers.

mmsegmentation reads files as blue, green, red. Version 1.x turns them around where `data_preprocessor` has
`bgr_to_rgb=True` (or `rgb_to_bgr`, the same operation), and does not by default; version 0.x does where
`img_norm_cfg.to_rgb` is true, which is the default. Mean and standard deviation are in the order after that, on the 0
to 255 scale. A head with one channel is a sigmoid: class 1 where it is above `threshold`, 0.3 by default.
"""

from collections.abc import Mapping
from typing import Any

from ..reading.settings import Settings, label_names
from ..recipe import Pictures
from ..references.pictures import Preprocessing

__all__ = ["count_channels", "head_settings", "label_settings", "read_pictures", "window_settings"]

RGB = 3  # channels that have an order to turn around
DEFAULT_THRESHOLD = 0.3  # of BaseDecodeHead, for one channel


def read_pictures(config: Mapping[str, Any], num_channels: int) -> Pictures | None:
    """Normalisation and order of channels, from a config's assignments; `None` where it names neither.

    Raises:
        CheckpointError: a setting is of the wrong type.
    """
    model = config.get("model")
    data = model.get("data_preprocessor") if isinstance(model, Mapping) else None
    data = data or config.get("data_preprocessor")
    old = config.get("img_norm_cfg")
    notes: tuple[str, ...] = ()
    if isinstance(data, Mapping):
        settings = Settings(data, "the config's data_preprocessor.")
        turned = settings.flag("bgr_to_rgb", False) or settings.flag("rgb_to_bgr", False)
        notes = _padding_notes(settings)
    elif isinstance(old, Mapping):
        settings = Settings(old, "the config's img_norm_cfg.")
        turned = settings.flag("to_rgb", True)
    else:
        return None
    mean, std = [settings.numbers(name, length=num_channels) for name in ("mean", "std")]
    bgr = num_channels == RGB and not turned
    order = -1 if bgr else 1
    processor = {
        "image_mean": [value / 255 for value in mean[::order]],
        "image_std": [value / 255 for value in std[::order]],
        "do_reduce_labels": _reduces_labels(config),
    }
    return Pictures(processor, bgr, Preprocessing(mean, std, top=255, bgr=bgr), notes)


def _padding_notes(data: Settings) -> tuple[str, ...]:
    if not data.section("test_cfg", default={}).values:
        return ()
    return (f"{data.where}test_cfg pads pictures before the model sees them; this is not done here",)


def _reduces_labels(config: Mapping[str, Any]) -> bool:
    labels = config.get("labels")
    return isinstance(labels, Mapping) and labels.get("reduce_zero_label") is True


def window_settings(model: Settings) -> tuple[dict[str, int], tuple[str, ...]]:
    """Size and stride of the sliding windows in pixels where the model was tested with them, and notes."""
    test = model.section("test_cfg", default={})
    if test.values.get("mode") != "slide":
        return {}, ()
    size, stride = test.pair("crop_size"), test.pair("stride")
    if size[0] != size[1] or stride[0] != stride[1]:
        return {}, (
            f"windows of crop_size={tuple(size)}, stride={tuple(stride)} are not kept: they must be square here",
        )
    return {"window_size": size[0], "window_stride": stride[0]}, ()


def count_channels(head: Settings) -> int:
    """Channels of the logits: one is enough for two classes, where `out_channels` says so.

    Raises:
        CheckpointError: a setting is missing or of the wrong type.
    """
    return head.integer("num_classes" if head.values.get("out_channels") is None else "out_channels")


def head_settings(head: Settings, num_labels: int) -> dict[str, Any]:
    """What the loss leaves out and, with one channel, the threshold of the foreground.

    Raises:
        CheckpointError: a setting is of the wrong type.
    """
    settings: dict[str, Any] = {"semantic_loss_ignore_index": head.whole("ignore_index", 255)}
    if num_labels == 1:
        stated = head.values.get("threshold") is not None
        settings["binary_threshold"] = head.share("threshold", 0.0) if stated else DEFAULT_THRESHOLD
    return settings


def label_settings(labels: Mapping[str, Any], num_labels: int) -> dict[str, Any]:
    """Class names and colours of the data set, where the checkpoint carries as many as it has classes.

    With one channel they are the foreground's, the second of two classes.
    """
    if num_labels == 1:
        two = {name: values[1:] for name, values in labels.items() if _is_list(values, 2)}
        labels = {**labels, **two}
    settings = label_names(labels.get("classes"), num_labels)
    palette: Any = labels.get("palette")
    if _is_list(palette, num_labels) and all(_is_list(colour, RGB) for colour in palette):
        settings["palette"] = [[int(value) for value in colour] for colour in palette]
    return settings


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == length
