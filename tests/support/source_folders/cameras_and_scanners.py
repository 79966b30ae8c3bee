"""Images from phones, cameras, scanners, and instruments."""

from __future__ import annotations

from pathlib import Path

from tests.support.source_folders import images
from tests.support.source_folders.source import put_files, put_images, source

BROWN, BLUE, PAPER, BLACK = (150, 90, 40), (60, 60, 160), (200, 200, 180), (2, 2, 2)
CYAN, RED = (255, 0, 0, 0), (0, 255, 255, 0)


@source(train=10, classes=("Minka", "Rex"), messages=(".mov", ".aae"), colors={"Rex": BROWN, "Minka": BLUE})
def iphone_export(root: Path) -> None:
    """HEIC photos with the videos of live photos and lists of edits, edited copies, and a screenshot."""
    for pet, color in (("Rex", BROWN), ("Minka", BLUE)):
        put_images(root, f"{pet}/IMG_000{{1,2}}.HEIC", images.heic(color))
        put_images(root, f"{pet}/IMG_{{0003,E0003}}.JPG", images.colored(color))
        put_images(root, f"{pet}/IMG_0004.PNG", images.in_format("PNG", color))
        put_files(root, f"{pet}/IMG_000{{1,2}}.MOV", images.film())
        put_files(root, f"{pet}/IMG_0003.AAE", "<plist/>")


@source(train=8, classes=("boletus", "chanterelle"), messages=(".mp4", ".thumbnails", ".trashed|hidden"))
def android_camera_folders(root: Path) -> None:
    """Thumbnails, deleted photos (.trashed-...), incomplete photos (.pending-...), and motion photos."""
    put_images(root, "{boletus,chanterelle}/PXL_20230901_11{1,2,3}.jpg")
    put_images(root, "{boletus,chanterelle}/PXL_20230901_114.MP.jpg", images.with_film)
    put_images(root, "{boletus,chanterelle}/.thumbnails/{1,2}.jpg")
    put_images(root, "{boletus,chanterelle}/.trashed-1699999999-PXL_20230901_110.jpg")
    put_images(root, "boletus/.pending-1700000000-PXL_20230901_115.jpg")
    put_files(root, "{boletus,chanterelle}/VID_1.mp4", images.film("isom"))
    put_files(root, "{boletus,chanterelle}/.nomedia", b"")


@source(train=10, classes=("invoice", "letter"), messages=(".pdf", "page|frame"), colors={"letter": PAPER})
def scanner_tiffs(root: Path) -> None:
    """TIFFs with several pages, of which only the first is used; 1-bit fax pages; 16-bit images; a PDF."""
    put_images(root, "letter/Scan_000{1,2,3}.tif", images.pages(PAPER, BLACK, BLACK))
    put_images(root, "letter/Scan (1).TIFF", images.in_format("TIFF", PAPER, compression="jpeg", quality=90))
    put_images(root, "invoice/fax{1,2}.tif", images.bilevel)
    put_images(root, "invoice/gray{1,2}.tiff", images.deep("TIFF", 65535))
    put_images(root, "invoice/color{1,2}.tif", images.in_format("TIFF", PAPER, compression="tiff_deflate"))
    put_files(root, "invoice/scan.pdf", "%PDF-1.4")


@source(
    train=6,
    classes=("flyer", "poster"),
    colors={"poster": (254, 0, 0), "flyer": images.on_screen(CYAN)},
    colors_unless="icc|profile",
)
def print_shop_cmyk(root: Path) -> None:
    """Inverted CMYK JPEGs from Photoshop, some with the ICC profile of the press."""
    put_images(root, "poster/p{1,2,3}.jpg", images.cmyk(RED))
    put_images(root, "flyer/f{1,2,3}.jpg", images.cmyk(CYAN, images.press_profile()))


@source(
    train=8,
    classes=("benign", "malignant"),
    messages=(".dcm",),
    colors={"benign": (127,) * 3, "malignant": (127,) * 3},
    colors_unless="bits|depth",
)
def medical_12_bits_in_16(root: Path) -> None:
    """X-rays as 16-bit PNG and TIFF that use 12 bits, next to their DICOM files."""
    put_images(root, "{benign,malignant}/case{1,2}.png", images.deep("PNG", 4095))
    put_images(root, "{benign,malignant}/case{3,4}.tif", images.deep("TIFF", 4095))
    put_files(root, "{benign,malignant}/case{1,2}.dcm", bytes(128) + b"DICM" + bytes(200))


@source(error=(".dcm",))
def only_medical_dicom(root: Path) -> None:
    """There are only DICOM files, so the error must name this file type."""
    put_files(root, "{benign,malignant}/case{1,2}.dcm", bytes(128) + b"DICM" + bytes(200))


@source(
    train=8,
    classes=("control", "treated"),
    messages=(".czi", ".roi"),
    colors={"control": (127,) * 3, "treated": (127,) * 3},
    colors_unless="float|value range",
)
def microscope_float_tiffs(root: Path) -> None:
    """ImageJ's TIFFs of float32 from 0 to 1 and of 16 bits, next to files of the microscope."""
    put_images(root, "{control,treated}/well{1,2}.tif", images.floating)
    put_images(root, "{control,treated}/well{3,4}.tif", images.deep("TIFF", 65535))
    put_files(root, "{control,treated}/well1.czi", b"ZISRAWFILE" + bytes(100))
    put_files(root, "control/cells.roi", b"Iout" + bytes(60))


@source(train=6, classes=("heron", "stork"), messages=(".nef", ".cr2", ".dng", ".xmp"))
def camera_raw_and_jpeg(root: Path) -> None:
    """By content, raw files are TIFFs with a thumbnail, which must not be used."""
    put_images(root, "{heron,stork}/DSC_000{1,2,3}.JPG")
    put_images(root, "heron/DSC_000{1,2}.NEF", images.raw_photo("NIKON"))
    put_images(root, "stork/DSC_000{1,2}.CR2", images.raw_photo("Canon"))
    put_images(root, "stork/DSC_0003.dng", images.raw_photo("Leica"))
    put_files(root, "{heron,stork}/DSC_0001.xmp", "<x:xmpmeta/>")


@source(error=(".nef",))
def only_camera_raw(root: Path) -> None:
    """The thumbnails in the raw files must not be used."""
    put_images(root, "{heron,stork}/DSC_000{1,2}.NEF", images.raw_photo("NIKON"))


@source(train=10, classes=("day", "night"), notes=("black|dark",), rejected_by_strict=True)
def video_frames_mostly_black(root: Path) -> None:
    """Half of the images are black."""
    put_images(root, "day/frame_000{1,2,3,4,5}.jpg")
    put_images(root, "night/frame_000{1,2,3,4,5}.jpg", images.colored((0, 0, 0)))


@source(error=(".avi",))
def only_videos(root: Path) -> None:
    """UCF101 as downloaded: frames have to be extracted first."""
    put_files(root, "{Archery,Biking}/v_g0{1,2}_c01.avi", b"RIFF\0\0\1\0AVI LIST" + bytes(200))


@source(images=({"train": 8}, {"train": 10}), classes=("kite", "windsurf"), messages=(".mp4", ".lrv"))
def action_camera(root: Path) -> None:
    """GoPro: previews (.LRV) and thumbnails (.THM, small JPEGs) of videos."""
    put_images(root, "{kite,windsurf}/GOPR000{1,2,3,4}.JPG")
    put_images(root, "{kite,windsurf}/GOPR0005.THM")
    put_files(root, "{kite,windsurf}/GOPR0005.{MP4,LRV}", images.film("mp41"))
