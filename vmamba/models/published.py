"""The published tables: every row with its config, its numbers and its released file, where there is one.

The numbers are those of the papers and pages of the models' authors (VMamba, arXiv 2401.10166 and its repository's
tables; the baselines as quoted there), percent; parameters in millions and multiply-adds as counted there.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from vmamba.models.variants import VARIANTS

_TIMM = "https://huggingface.co/timm/"
_DET = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2det/"
_SEG = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2seg/"


@dataclass(frozen=True)
class Row:
    config: str  # below configs/, without .yaml
    name: str
    numbers: Mapping[str, float]  # what it is called there: percent
    parameters: float  # millions
    gflops: float
    weights: str = ""  # address of the released file
    start: str = ""  # of the classifier's whose backbone training starts from

    @property
    def table(self) -> str:
        """ "classification", "detection" or "segmentation"."""
        return self.config.partition("/")[0] if "/" in self.config else "classification"


def _ours() -> list[Row]:
    rows = []
    for name, variant in VARIANTS.items():
        if variant.released_as:
            numbers = {} if variant.accuracy is None else {"top-1": variant.accuracy}
            millions = variant.parameters / 1e6
            rows.append(Row(name, variant.released_as, numbers, millions, variant.gflops, variant.weights or ""))
    return rows


def _of_timm(hub: str) -> str:
    return f"{_TIMM}{hub}/resolve/main/model.safetensors"


def _baseline(config: str, name: str, top1: float, parameters: float, gflops: float, hub: str) -> Row:
    return Row(config, name, {"top-1": top1}, parameters, gflops, _of_timm(hub))


def _start(backbone: str) -> str:
    """The weights of a backbone, called as in the names of the configs."""
    if backbone.startswith("swin"):
        return _of_timm(f"{backbone}_patch4_window7_224.ms_in1k")
    return VARIANTS[backbone].weights or ""


def _mask_rcnn(
    backbone: str, name: str, schedule: str, box: float, mask: float, parameters: float, gflops: float, file: str = ""
) -> Row:
    return Row(
        f"detection/mask_rcnn_{backbone}_{schedule}",
        f"Mask R-CNN {schedule}, {name}",
        {"box AP": box, "mask AP": mask},
        parameters,
        gflops,
        file and _DET + file,
        _start(backbone),
    )


def _upernet(
    config: str, name: str, single: float, several: float | None, parameters: float, gflops: float, file: str = ""
) -> Row:
    numbers = {"mIoU": single} | ({} if several is None else {"mIoU at several scales": several})
    return Row(
        f"segmentation/upernet_{config}",
        f"UperNet, {name}",
        numbers,
        parameters,
        gflops,
        file and _SEG + file,
        _start(config.removesuffix("_640")),
    )


_D, _S = "mask_rcnn_vssm_fpn_coco_", "upernet_vssm_4xb4-160k_ade20k-512x512_"
PUBLISHED: tuple[Row, ...] = (
    *_ours(),
    _baseline("deit_small", "DeiT-S", 79.8, 22, 4.6, "deit_small_patch16_224.fb_in1k"),
    _baseline("deit_base", "DeiT-B", 81.8, 86, 17.5, "deit_base_patch16_224.fb_in1k"),
    _baseline("deit_base_384", "DeiT-B at 384", 83.1, 86, 55.4, "deit_base_patch16_384.fb_in1k"),
    _baseline("swin_tiny", "Swin-T", 81.2, 28, 4.5, "swin_tiny_patch4_window7_224.ms_in1k"),
    _baseline("swin_small", "Swin-S", 83.2, 50, 8.7, "swin_small_patch4_window7_224.ms_in1k"),
    _baseline("swin_base", "Swin-B", 83.5, 88, 15.4, "swin_base_patch4_window7_224.ms_in1k"),
    #
    _mask_rcnn("swin_tiny", "Swin-T", "1x", 42.7, 39.3, 48, 267),
    _mask_rcnn("swin_small", "Swin-S", "1x", 44.8, 40.9, 69, 354),
    _mask_rcnn("swin_base", "Swin-B", "1x", 46.9, 42.3, 107, 496),
    _mask_rcnn("vmamba_tiny", "VMamba-T", "1x", 46.5, 42.1, 42, 286),
    _mask_rcnn("vmamba_small", "VMamba-S", "1x", 48.2, 43.0, 64, 400),
    _mask_rcnn("vmamba_base", "VMamba-B", "1x", 48.5, 43.1, 96, 540),
    _mask_rcnn("vmamba_tiny_s1l8", "VMamba-T[s1l8]", "1x", 47.3, 42.7, 50, 271, f"{_D}tiny_s_epoch_12.pth"),
    _mask_rcnn("vmamba_small_s2l15", "VMamba-S[s2l15]", "1x", 48.7, 43.7, 70, 384, f"{_D}small_epoch_11.pth"),
    _mask_rcnn("vmamba_base_s2l15", "VMamba-B[s2l15]", "1x", 49.2, 44.1, 108, 485, f"{_D}base_epoch_11.pth"),
    _mask_rcnn("swin_tiny", "Swin-T", "3x", 46.0, 41.6, 48, 267),
    _mask_rcnn("swin_small", "Swin-S", "3x", 48.2, 43.2, 69, 354),
    _mask_rcnn("vmamba_tiny", "VMamba-T", "3x", 48.5, 43.2, 42, 286),
    _mask_rcnn("vmamba_small", "VMamba-S", "3x", 49.7, 44.0, 64, 400),
    _mask_rcnn("vmamba_tiny_s1l8", "VMamba-T[s1l8]", "3x", 48.8, 43.7, 50, 271, f"{_D}tiny_ms_3x_s_epoch_31.pth"),
    _mask_rcnn("vmamba_small_s2l15", "VMamba-S[s2l15]", "3x", 49.9, 44.2, 70, 384, f"{_D}small_ms_3x_epoch_32.pth"),
    #
    _upernet("swin_tiny", "Swin-T", 44.4, 45.8, 60, 945),
    _upernet("swin_small", "Swin-S", 47.6, 49.5, 81, 1039),
    _upernet("swin_base", "Swin-B", 48.1, 49.7, 121, 1188),
    _upernet("vmamba_tiny", "VMamba-T", 47.3, None, 55, 964),
    _upernet("vmamba_small", "VMamba-S", 49.5, None, 76, 1081),
    _upernet("vmamba_base", "VMamba-B", 50.0, None, 110, 1226),
    _upernet("swin_small_640", "Swin-S at 640", 47.9, None, 81, 1614),
    _upernet("vmamba_small_640", "VMamba-S at 640", 50.8, None, 76, 1620),
    _upernet("vmamba_tiny_s1l8", "VMamba-T[s1l8]", 47.9, 48.8, 62, 949, f"{_S}tiny_s_iter_160000.pth"),
    _upernet("vmamba_small_s2l15", "VMamba-S[s2l15]", 50.6, 51.2, 82, 1028, f"{_S}small_iter_144000.pth"),
    _upernet("vmamba_base_s2l15", "VMamba-B[s2l15]", 51.0, 51.6, 122, 1170, f"{_S}base_iter_160000.pth"),
)


if __name__ == "__main__":  # what modelcard.sh reads: a line a row
    for row in PUBLISHED:
        numbers = ", ".join(f"{number:g}% {name}" for name, number in row.numbers.items()) or "no published number"
        print(row.config, row.weights or "-", row.start or "-", f"{row.name}: {numbers}", sep="\t")
