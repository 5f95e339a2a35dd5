"""`ailurus-hf predict`: pictures to label maps."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from ..utils.files import (
    MARK,
    atomic_file,
    check_output_directory,
    check_output_file,
    is_marked,
    read_json_object,
    remove_leftovers,
)
from .options import (
    ClusterLayer,
    CompressedSize,
    Device,
    Dtype,
    Grouping,
    Json,
    KeepRatio,
    Model,
    SkipUnreadable,
    SlidingWindow,
    load_on_device,
    load_processor,
    parse_output,
)

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ..evaluation import Segmentation


ENDS = (".labels.png", ".overlay.png", ".json")


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures, or folders of them.")],
    model: Model,
    out: Annotated[
        Path,
        typer.Option(parser=parse_output, metavar="FOLDER", help="Folder for the results; older ones are replaced."),
    ] = Path("predictions"),
    keep_ratio: KeepRatio = None,
    compressed_size: CompressedSize = None,
    grouping: Grouping = None,
    cluster_layer: ClusterLayer = None,
    sliding_window: SlidingWindow = False,
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Pictures in folders below too; OUT gets the same folders.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out pictures whose results are in OUT already.")
    ] = False,
    skip_unreadable: SkipUnreadable = False,
    device: Device = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Segment pictures with a checkpoint.

    For each picture NAME, OUT gets NAME.labels.png (class ids as pixel values), NAME.overlay.png (the classes' colours
    on the picture) and NAME.json (the classes and the share of pixels each has). Files of these names that this command
    did not write are never replaced, and its results among the pictures are no pictures.
    """
    from ..data.images import ImageFileError
    from ..data.label_maps import check_equal_names
    from ..modeling.label_maps import class_names
    from ..visualization import model_palette

    names = _names(images, out, recursive)
    check_equal_names(list(names), list(names.values()), "be written as {}.*")
    finished = {name for name in names.values() if resume and _is_report(out / f"{name}.json")}
    # It would be a pity to find out after the model has run.
    _check_outputs(out, [name for name in names.values() if name not in finished])
    network = load_on_device(
        model,
        device,
        dtype,
        keep_ratio=keep_ratio,
        compressed_size=compressed_size,
        grouping=grouping,
        cluster_layer=cluster_layer,
    )
    processor, palette = load_processor(model), model_palette(network.config)
    classes = class_names(network.config.id2label, network.config.num_labels)
    reports, skipped = [], []
    for file, name in tqdm(names.items(), "predicting", leave=False, disable=None):
        if name in finished:
            reports.append(read_json_object(out / f"{name}.json", "a picture's classes"))
            continue
        try:
            picture, result = _segment(file, network, processor, sliding_window)
        except ImageFileError as error:
            if not skip_unreadable:
                raise
            skipped.append(str(error))
            continue
        report = _describe(file, picture, result, classes)
        _write(out, name, picture, result.labels, palette, report)
        reports.append(report)
    if not reports:
        raise ValueError(f"none of the {len(names)} pictures could be read; the first: {skipped[0]}")
    for line in skipped:
        typer.echo(f"ailurus-hf: warning: skipped: {line}", err=True)
    if as_json:
        typer.echo(json.dumps(reports, indent=2))
        return
    for report in reports:
        shares = sorted(report["classes"], key=lambda entry: -entry["share"])[:4]
        summary = ", ".join(f"{entry['name']} {entry['share']:.0%}" for entry in shares)
        typer.echo(f"{report['image']}: {summary}")
    earlier = f" ({len(finished)} of them before)" if finished else ""
    typer.echo(f"written to {out}: {len(reports)} x .labels.png, .overlay.png, .json{earlier}")


def _check_outputs(out: Path, names: list[str]) -> None:
    """Check that all results can be written, and remove what a killed run left of them."""
    check_output_directory(out, overwrite=True)
    for name in names:
        for end in ENDS:
            check_output_file(out / f"{name}{end}", is_marked)
    for folder in {(out / name).parent for name in names}:
        if folder.is_dir():
            remove_leftovers(folder)


def _is_report(path: Path) -> bool:
    """Whether a picture's results are complete: this is the last of its files to be written."""
    try:
        return path.is_file() and {"image", "tokens", "classes"} <= set(read_json_object(path, "a picture's classes"))
    except ValueError:
        return False


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # `Path.resolve` raises where links go round in a loop


def _names(images: list[Path], out: Path, recursive: bool) -> dict[Path, str]:
    """What the results of each picture are called in `out`, up to the dot: with `recursive` by the folders below."""
    from ..data.images import is_litter, list_images

    names: dict[Path, str] = {}
    for given in images:
        if is_litter(given):  # a shell's * names it too
            continue
        for file in list_images([given], recursive):
            # Results of an earlier run, where they lie below the pictures, are none.
            if not (recursive and given.is_dir() and _real(file).is_relative_to(_real(out))):
                inside = file.relative_to(given) if given.is_dir() else Path(file.name)
                names[file] = str(inside.parent / inside.stem)
    if not names:
        raise FileNotFoundError("there are no pictures among the files")
    return names


def _segment(file: Path, network: Any, processor: Any, sliding_window: bool) -> "tuple[Image.Image, Segmentation]":
    """The picture in a file and its segmentation; every `ImageFileError` names the file."""
    from ..data.images import ImageFileError, read_image
    from ..evaluation import segment_image

    picture = read_image(file)
    try:
        return picture, segment_image(network, processor, picture, sliding_window)
    except ImageFileError as error:  # too small for the model
        raise ImageFileError(f"{file}: {error}") from error


def _describe(file: Path, picture: "Image.Image", result: "Segmentation", names: list[str]) -> dict[str, Any]:
    import numpy as np

    counts = np.bincount(result.labels.ravel(), minlength=len(names))
    return {
        "program": MARK,
        "image": str(file),
        "height": picture.height,
        "width": picture.width,
        "patches": None if result.clusters is None else result.clusters.size,
        "tokens": result.num_tokens,
        "classes": [
            {"id": label, "name": names[label], "share": round(int(count) / result.labels.size, 6)}
            for label, count in enumerate(counts)
            if count
        ],
    }


def _write(
    out: Path, name: str, picture: "Image.Image", labels: "np.ndarray", palette: "np.ndarray", report: dict[str, Any]
) -> None:
    from PIL.PngImagePlugin import PngInfo

    from ..visualization import indexed_image, overlay

    mark = PngInfo()
    mark.add_text("Software", MARK)
    for end, shown in (
        (".labels.png", indexed_image(labels, palette)),
        (".overlay.png", overlay(picture, labels, palette)),
    ):
        with atomic_file(out / f"{name}{end}", is_marked, tidy=False) as path:
            shown.save(path, pnginfo=mark)
    with atomic_file(out / f"{name}.json", is_marked, tidy=False) as path:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
