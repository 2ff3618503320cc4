"""Encoded images and labels to a folder of arrays, for `gns-pretrain prepare-images`.

The folder is made beside its name and renamed at the end: it is whole or not there. Images are
decoded once, and resized by Pillow alone, so the same files and version give the same bytes.
"""

import io
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gns_pretrain.data.images import (
    META_FILE,
    ImageMeta,
    read_image_meta,
    write_image_meta,
    write_split,
)
from gns_pretrain.data.prepare.corpus import find_files
from gns_pretrain.data.tokenization import hub_hint
from gns_pretrain.errors import InputError, needs, one_line
from gns_pretrain.fields import About, Settings, at_least, path_name, setting_name
from gns_pretrain.system.files import must_write, read_bytes, whole_folder
from gns_pretrain.system.processes import available_cores
from gns_pretrain.system.terminal import Console

SPLITS = ("validation", "train")  # the small one first: what is wrong with it shows early
# Pillow knows formats that start other programs (EPS starts Ghostscript); these are pictures alone.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
MAX_PIXELS = 2**26  # of an encoded image; a larger one is more likely made to fill the memory
PORTION = 256  # images decoded, and written, at a time
MAX_CLASSES = 2**20  # where labels are numbers alone
COLUMNS = (
    SpinnerColumn(),
    TextColumn("{task.description} {task.completed:,.0f} images"),
    TimeElapsedColumn(),
)


@dataclass
class PrepareImagesSettings(Settings):
    """Where images and labels come from, and the size that they get."""

    section: ClassVar[str] = "--"

    out: Annotated[str, path_name(), About("folder to write; it is whole or not there")]
    train: Annotated[
        list[str],
        path_name(),
        About(".parquet files or globs, or a folder of a folder per class; of --dataset a split"),
    ] = field(default_factory=list)
    validation: Annotated[list[str], path_name(), About("the same, of the validation split")] = (
        field(default_factory=list)
    )
    dataset: Annotated[
        str | None, About("dataset on the hub; --train and --validation name its splits")
    ] = None
    dataset_config: Annotated[str | None, About("its configuration, if it has several")] = None
    size: Annotated[
        int | None,
        at_least(1),
        About("pixels; cut out the middle square and resize it; default: images are of one size"),
    ] = None
    image_column: Annotated[str | None, About("column of images; default: the only one")] = None
    label_column: Annotated[str | None, About("column of labels; default: the only one")] = None
    workers: Annotated[int, at_least(0), About("threads that decode; 0: one per core")] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for split in SPLITS:
            if self.dataset is not None:
                setattr(self, split, getattr(self, split) or [split])
            elif not getattr(self, split):
                raise InputError(
                    f"--{split} is missing: give .parquet files or a folder of classes, or the "
                    "name of a dataset on the hub as --dataset"
                )

    def identity(self) -> dict[str, Any]:
        """All that decides what the folder holds, as JSON; files count by their names."""
        identity = asdict(self)
        del identity["out"], identity["workers"]
        if self.dataset is None:
            identity |= {s: [Path(p).name for p in getattr(self, s)] for s in SPLITS}
        return identity


def prepare_images(settings: PrepareImagesSettings) -> dict[str, Any]:
    """Make the folder settings.out, or check that it is there.

    Returns:
        folder, status ("prepared" or "already prepared"), height, width, channels, classes, images
        by split, and seconds.

    Raises:
        InputError: naming the setting, or the file and the row, that is bad; a folder that holds
            something else.
    """
    with needs("images", "gns-pretrain prepare-images needs datasets and Pillow"):
        import datasets  # noqa: F401
        import PIL  # noqa: F401
    folder, began = Path(settings.out), time.perf_counter()
    if (folder / META_FILE).is_file():
        meta = read_image_meta(folder)
        for name, value in settings.identity().items():
            if meta.settings.get(name) != value:
                raise InputError(
                    f"{setting_name('--', name)}={value}, but {folder} was made with "
                    f"{meta.settings.get(name)}; give the same settings, or another --out"
                )
        return _row(folder, meta, "already prepared", 0.0)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--out={folder} holds other files; name a new or an empty folder")
    with must_write(folder, setting="--out", hint="name another folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as unfinished:
            meta = _write_folder(unfinished, settings)
    return _row(folder, meta, "prepared", time.perf_counter() - began)


def _write_folder(folder: Path, settings: PrepareImagesSettings) -> ImageMeta:
    """Write both splits and meta.json."""
    sources = {split: open_source(settings, split) for split in SPLITS}
    classes = sources["train"].classes
    if classes != sources["validation"].classes:
        shown = [", ".join(s.classes) if s.classes else "numbers" for s in sources.values()]
        raise InputError(
            f"--validation has the classes {shown[0]}, and --train {shown[1]}; both need the same"
        )
    refuse_single_class(classes)
    shape: tuple[int, ...] = ()
    written = {}
    with (
        ThreadPoolExecutor(settings.workers or available_cores()) as pool,
        Progress(*COLUMNS, console=Console(stderr=True)) as bars,
    ):
        for split in SPLITS:
            first = next(sources[split].records, None)
            if first is None:
                raise InputError(f"--{split} holds no image; name files that do")
            shape = shape or decoded(first, settings.size).shape
            records = chain([first], sources[split].records)
            report = partial(bars.advance, bars.add_task(split, total=None))
            parts = decoded_parts(records, settings.size, shape, pool, report)
            written[split] = write_split(folder, split, parts, shape)
    if classes is None:
        labels = [np.load(folder / files.labels) for files, _ in written.values()]
        classes = tuple(map(str, range(1 + max(int(found.max()) for found in labels))))
        refuse_single_class(classes)
    mean, deviation = written["train"][1].mean_and_deviation()
    height, width, channels = shape
    meta = ImageMeta(
        height=height,
        width=width,
        channels=channels,
        classes=classes,
        mean=mean,
        deviation=deviation,
        splits={split: written[split][0] for split in reversed(SPLITS)},
        settings=settings.identity(),
    )
    write_image_meta(folder, meta)
    return meta


def refuse_single_class(classes: tuple[str, ...] | None) -> None:
    """Raise InputError for one class: nothing can be learned from it."""
    if classes is not None and len(classes) == 1:
        raise InputError(f"--train has one class alone, {classes[0]}; a classifier needs two")


def _row(folder: Path, meta: ImageMeta, status: str, seconds: float) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "status": status,
        "height": meta.height,
        "width": meta.width,
        "channels": meta.channels,
        "classes": len(meta.classes),
        "images": {split: files.count for split, files in meta.splits.items()},
        "seconds": round(seconds, 3),
    }


class Record(NamedTuple):
    """One image, not decoded yet."""

    origin: str  # file, and the row in it, for error messages
    content: bytes
    label: int


class Source(NamedTuple):
    """A split: the names of its classes, None where labels are numbers alone, and its records."""

    classes: tuple[str, ...] | None
    records: Iterator[Record]


def open_source(settings: PrepareImagesSettings, split: str) -> Source:
    """Open what a split is made of; InputError names the setting that leads nowhere."""
    named: list[str] = getattr(settings, split)
    if settings.dataset is not None:
        return _columns(settings, split, settings.dataset, " ".join([settings.dataset, *named]))
    if len(named) == 1 and Path(named[0]).is_dir():
        return _class_folders(Path(named[0]), f"--{split}")
    files = find_files(named, f"--{split}")
    for path in files:
        if path.suffix != ".parquet":
            raise InputError(
                f"--{split}={path} is not a .parquet file; images in files of their own are "
                "given as a folder that has a folder for each class"
            )
    opened = [_columns(settings, split, "parquet", str(path)) for path in files]
    if any(source.classes != opened[0].classes for source in opened):
        raise InputError(f"--{split}: its files do not have the same classes; prepare them apart")
    return Source(opened[0].classes, chain.from_iterable(source.records for source in opened))


def _class_folders(folder: Path, setting: str) -> Source:
    """Images in a folder of each class, both in the order of their names."""
    visible = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    others = [path.name for path in visible if not path.is_dir()]
    if others or not visible:
        raise InputError(
            f"{setting}={folder} must hold one folder for each class, nothing else; it holds "
            f"{others[0] if others else 'nothing'}"
        )

    def records() -> Iterator[Record]:
        for label, of_class in enumerate(visible):
            for path in sorted(of_class.iterdir()):
                if path.name.startswith("."):
                    continue
                if path.suffix.lower() not in SUFFIXES:
                    raise InputError(f"{path} is not a file ending in {', '.join(SUFFIXES)}")
                yield Record(str(path), read_bytes(path, hint="mend or remove it"), label)

    return Source(tuple(path.name for path in visible), records())


def _columns(settings: PrepareImagesSettings, split: str, dataset: str, origin: str) -> Source:
    """Two columns of a Parquet file or of a split of a dataset on the hub, streamed."""
    from datasets import ClassLabel, Image, load_dataset

    is_file = settings.dataset is None
    try:
        rows: Any = load_dataset(
            dataset,
            None if is_file else settings.dataset_config,
            data_files={split: origin} if is_file else None,
            split=split if is_file else "+".join(getattr(settings, split)),
            streaming=True,
        )
        features = dict(rows.features or {})
    except Exception as error:
        setting = f"--{split}" if is_file else "--dataset"
        raise InputError(
            f"{setting}={origin} cannot be opened ({type(error).__name__}: {one_line(error)}); "
            + hub_hint(error, "check the file, or the name, its splits and the network")
        ) from error
    as_image = {name for name, kind in features.items() if isinstance(kind, Image)}
    encoded = {n for n, kind in features.items() if isinstance(kind, dict) and "bytes" in kind}
    as_label = {
        name
        for name, kind in features.items()
        if isinstance(kind, ClassLabel) or "int" in str(getattr(kind, "dtype", ""))
    }
    image = _chosen(settings.image_column, as_image | encoded, "--image-column", origin, features)
    label = _chosen(settings.label_column, as_label, "--label-column", origin, features)
    kind = features[label]
    classes = tuple(kind.names) if isinstance(kind, ClassLabel) else None
    rows = rows.select_columns([image, label])
    if image in as_image:
        rows = rows.cast_column(image, Image(decode=False))

    def records() -> Iterator[Record]:
        number = 0
        try:
            for number, row in enumerate(rows, 1):
                content, value = (row[image] or {}).get("bytes"), row[label]
                where = f"{origin}, row {number}"
                # Not a path: a file of somebody else could name any file here.
                if not isinstance(content, bytes):
                    raise InputError(f"{where}: its image has no bytes; leave the row out")
                if value is None or not 0 <= value < (len(classes) if classes else MAX_CLASSES):
                    raise InputError(f"{where}: {value} is not the label of a class")
                yield Record(where, content, int(value))
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{origin}: reading failed after row {number} ({type(error).__name__}: "
                f"{one_line(error)}); "
                + hub_hint(error, "fix the file or the connection and repeat the command")
            ) from error

    return Source(classes, records())


def _chosen(
    given: str | None, fitting: Collection[str], setting: str, origin: str, all_names: Iterable[str]
) -> str:
    """The column that a setting names, or the only one that fits."""
    if given is None and len(fitting) == 1:
        return next(iter(fitting))
    if given is None or given not in fitting:
        found = f"{setting}={given}" if given else f"{len(fitting)} columns fit {setting}"
        raise InputError(
            f"{origin}: {found}; its columns are {', '.join(all_names)}, and of encoded images or "
            f"integer labels as it takes them: {', '.join(sorted(fitting)) or 'none'}"
        )
    return given


def decoded(record: Record, size: int | None) -> np.ndarray:
    """Decode one image, uint8 [H, W, 3]; with a size the middle square, [size, size, 3].

    Raises:
        InputError: naming the record whose image is damaged, of another format, or enormous.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata; what matters is an error
            image: Any = Image.open(io.BytesIO(record.content), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"{record.origin}: an image of {image.width} x {image.height} pixels; at most "
                    f"{MAX_PIXELS:,} are decoded"
                )
            if image.mode.startswith(("I", "F")):  # Pillow would cut off all above 255
                raise InputError(
                    f"{record.origin}: its pixels have more than 8 bits (mode {image.mode}); "
                    "convert it to 8 bits first"
                )
            image = ImageOps.exif_transpose(image).convert("RGB")
            if size is not None:
                image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        return np.asarray(image)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            f"{record.origin}: it is no image of {', '.join(FORMATS)}; mend or remove it"
        ) from error
    except Exception as error:  # decoders raise many kinds
        raise InputError(
            f"{record.origin}: its image cannot be decoded ({one_line(error)}); mend or remove it"
        ) from error


def decoded_parts(
    records: Iterator[Record],
    size: int | None,
    shape: tuple[int, ...],
    pool: ThreadPoolExecutor,
    report: Callable[[int], object],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decode records, a portion at a time; `report` gets the number of images that it had.

    Raises:
        InputError: naming the first image of another shape.
    """
    while portion := list(islice(records, PORTION)):
        images = list(pool.map(partial(decoded, size=size), portion))
        for record, image in zip(portion, images, strict=True):
            if image.shape != shape:
                raise InputError(
                    f"{record.origin}: an image of {image.shape[1]} x {image.shape[0]} pixels, and "
                    f"others have {shape[1]} x {shape[0]}; --size makes all of one size"
                )
        yield np.stack(images), np.array([record.label for record in portion], dtype=np.int64)
        report(len(portion))
