"""`ailurus-hf convert`: a checkpoint of another project becomes an AiluRus checkpoint."""

import json
import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..utils.errors import CheckpointWarning
from ..utils.files import read_json_object
from .options import Json, parse_output

if TYPE_CHECKING:
    from ..conversion import ConversionReport


def convert(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Source: segmenter, transformers, timm, dino, dinov2, mae, mmseg, segformer, ailurus, or auto.",
        ),
    ],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Checkpoint folder or file; for transformers, timm and ailurus also a name on the Hub.",
        ),
    ],
    output: Annotated[Path, typer.Argument(parser=parse_output, metavar="OUT", help="Folder to write.")],
    keep_ratio: Annotated[
        float | None,
        typer.Option(help="Share of tokens the model keeps by default, above 0 and at most 1.", show_default="0.5"),
    ] = None,
    cluster_layer: Annotated[
        int | None,
        typer.Option(help="Layers that run on all tokens before they are grouped.", show_default="the method's"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="that of the source")
    ] = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", "--shards", help="Largest weight file.")] = "5GB",
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help='Class names, colours, and the label that does not count: {"id2label": {"0": "Sky", ...}, '
            '"palette": [[70, 130, 180], ...], "ignore_index": 255}.',
            show_default="LABEL_i",
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="Licence of the weights, for the model card.", show_default="what the source says"),
    ] = None,
    entry: Annotated[
        str | None,
        typer.Option(
            help="Entry of the file that holds the weights, where it holds several, such as state_dict_ema.",
            show_default="the one that is not averaged; of DINO and DINOv2 the teacher",
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set a field of the config, such as num_attention_heads=6 or image_size=[480,640]; may be repeated.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint folder of this program that holds nothing else.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the key table, write nothing.")] = False,
    verify: Annotated[bool, typer.Option(help="Load the result and compare its output with the source.")] = True,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint of another project into a folder that from_pretrained loads.

    The source is read without running anything in it, checked key by key, and compared with the result.
    OUT appears only when all of that went well.
    """
    settings = {"keep_ratio": keep_ratio, "cluster_layer": cluster_layer, **_read_labels(labels)}
    settings |= _parse_assignments(assignments or [])
    # The current step on stderr; nothing where that is no terminal.
    with Console(stderr=True).status(escape(f"converting {source}")) as status, warnings.catch_warnings():
        from ..conversion import convert_checkpoint

        warnings.simplefilter("ignore", CheckpointWarning)  # they are in the report
        report = convert_checkpoint(
            name,
            source,
            output,
            overwrite=overwrite,
            dtype=dtype,
            max_shard_size=max_shard_size,
            verify=verify,
            dry_run=dry_run,
            license=license,
            entry=entry,
            progress=lambda step: status.update(escape(step)),
            **{key: value for key, value in settings.items() if value is not None},
        )
    for warning in report.warnings:
        typer.echo(f"ailurus-hf: warning: {warning}", err=True)
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else _as_text(report))


def _read_labels(path: Path | None) -> dict[str, Any]:
    """`id2label` and, if the file has them, `palette` and `ignore_index`; `None` is left out later."""
    if path is None:
        return {}
    content = read_json_object(path, "id2label")
    names = content.get("id2label")
    if not isinstance(names, dict):
        raise ValueError(f'--labels {path} must hold {{"id2label": {{"0": "name", ...}}}}')
    ignored = content.get("ignore_index")
    return {"id2label": names, "palette": content.get("palette") or None, "semantic_loss_ignore_index": ignored}


def _parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`key=value` pairs; a value is JSON where it reads as such (6, 0.1, true, [480,640]), else text."""
    settings = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--set must be key=value, got {assignment!r}")
        try:
            settings[key] = json.loads(value)
        except RecursionError:
            raise ValueError(f"--set {key}: the value is nested too deeply") from None
        except ValueError:
            settings[key] = value
    return settings


def _as_text(report: "ConversionReport") -> str:
    lines = _key_table(report) if not report.written else []
    size = f"{report.num_tensors} tensors, {report.num_parameters:,} parameters, {report.dtype}"
    lines += [f"source    {report.source}", f"sha256    {report.sha256}"]
    if report.recognised:
        lines.append(f"recognised {report.recipe}: {report.recognised}")
    for reason in dict.fromkeys(report.dropped.values()):
        keys = [key for key, why in report.dropped.items() if why == reason]
        lines.append(f"dropped   {', '.join(keys)} ({reason})")
    lines += [f"assumed   {assumption}" for assumption in report.assumptions]
    if not report.written:
        return "\n".join([*lines, f"dry run   nothing written; {report.output} would hold {size}"])
    if report.verification is not None:
        difference, against = report.verification.largest_difference, report.verification.against
        lines.append(f"verified  largest difference {difference:.1e}, against {against}")
    lines.append(f"written   {report.output}: {size}")
    model = shlex.quote(str(report.output))
    if report.model_class.endswith("ForSemanticSegmentation"):
        lines.append(f"next      ailurus-hf predict IMAGE --model {model} --keep-ratio 0.25 --out predictions")
    else:
        lines.append(f"next      ailurus_hf.{report.model_class}.from_pretrained({str(report.output)!r})")
    return "\n".join(lines)


def _key_table(report: "ConversionReport") -> list[str]:
    """One line per source tensor. Plain text: a table cut to the terminal's width would lose the names."""
    width = max(len(row.source) for row in report.key_table)
    shapes = [" x ".join(map(str, row.shape)) for row in report.key_table]
    shape_width = max(map(len, shapes))
    return [
        f"{row.source:<{width}}  {shape:<{shape_width}}  {row.rule:<9}  {', '.join(row.targets) or '-'}"
        for row, shape in zip(report.key_table, shapes, strict=True)
    ] + [""]
