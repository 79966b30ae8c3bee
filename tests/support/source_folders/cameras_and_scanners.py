"""Pictures as phones, cameras, scanners and instruments leave them."""

from __future__ import annotations

from pathlib import Path

from tests.support.source_folders import images as made
from tests.support.source_folders.source import pictures, put, source

BROWN, BLUE, PAPER, BLACK = (150, 90, 40), (60, 60, 160), (200, 200, 180), (2, 2, 2)
CYAN, RED = (255, 0, 0, 0), (0, 255, 255, 0)


@source(train=10, classes=("Minka", "Rex"), says=(".mov", ".aae"), colours={"Rex": BROWN, "Minka": BLUE})
def iphone_export(root: Path) -> None:
    """HEIC with the films of live photos and the lists of edits beside; edited copies; a screenshot."""
    for pet, colour in (("Rex", BROWN), ("Minka", BLUE)):
        pictures(root, f"{pet}/IMG_000{{1,2}}.HEIC", made.heic(colour))
        pictures(root, f"{pet}/IMG_{{0003,E0003}}.JPG", made.coloured(colour))
        pictures(root, f"{pet}/IMG_0004.PNG", made.in_format("PNG", colour))
        put(root, f"{pet}/IMG_000{{1,2}}.MOV", made.film())
        put(root, f"{pet}/IMG_0003.AAE", "<plist/>")


@source(train=8, classes=("boletus", "chanterelle"), says=(".mp4", ".thumbnails", ".trashed|hidden"))
def android_camera_folders(root: Path) -> None:
    """Thumbnails, photos in the bin (.trashed-...) and half-written ones (.pending-...), and motion photos."""
    pictures(root, "{boletus,chanterelle}/PXL_20230901_11{1,2,3}.jpg")
    pictures(root, "{boletus,chanterelle}/PXL_20230901_114.MP.jpg", made.with_film)
    pictures(root, "{boletus,chanterelle}/.thumbnails/{1,2}.jpg")
    pictures(root, "{boletus,chanterelle}/.trashed-1699999999-PXL_20230901_110.jpg")
    pictures(root, "boletus/.pending-1700000000-PXL_20230901_115.jpg")
    put(root, "{boletus,chanterelle}/VID_1.mp4", made.film("isom"))
    put(root, "{boletus,chanterelle}/.nomedia", b"")


@source(train=10, classes=("invoice", "letter"), says=(".pdf", "page|frame"), colours={"letter": PAPER})
def scanner_tiffs(root: Path) -> None:
    """Several pages a file, of which the first is used and that is said; fax pages of one bit; 16 bits; a PDF."""
    pictures(root, "letter/Scan_000{1,2,3}.tif", made.pages(PAPER, BLACK, BLACK))
    pictures(root, "letter/Scan (1).TIFF", made.in_format("TIFF", PAPER, compression="jpeg", quality=90))
    pictures(root, "invoice/fax{1,2}.tif", made.bilevel)
    pictures(root, "invoice/grey{1,2}.tiff", made.deep("TIFF", 65535))
    pictures(root, "invoice/colour{1,2}.tif", made.in_format("TIFF", PAPER, compression="tiff_deflate"))
    put(root, "invoice/scan.pdf", "%PDF-1.4")


@source(
    train=6,
    classes=("flyer", "poster"),
    colours={"poster": (254, 0, 0), "flyer": made.on_screen(CYAN)},
    unless_noted="icc|profile",
)
def print_shop_cmyk(root: Path) -> None:
    """CMYK JPEGs from Photoshop, inverted; some with the profile of the press."""
    pictures(root, "poster/p{1,2,3}.jpg", made.cmyk(RED))
    pictures(root, "flyer/f{1,2,3}.jpg", made.cmyk(CYAN, made.press_profile()))


@source(
    train=8,
    classes=("benign", "malignant"),
    says=(".dcm",),
    colours={"benign": (127,) * 3, "malignant": (127,) * 3},
    unless_noted="bits|depth",
)
def medical_12_bits_in_16(root: Path) -> None:
    """X-rays as PNG and TIFF of 16 bits of which 12 are used, the DICOM files beside."""
    pictures(root, "{benign,malignant}/case{1,2}.png", made.deep("PNG", 4095))
    pictures(root, "{benign,malignant}/case{3,4}.tif", made.deep("TIFF", 4095))
    put(root, "{benign,malignant}/case{1,2}.dcm", bytes(128) + b"DICM" + bytes(200))


@source(refused=(".dcm",))
def medical_dicom_alone(root: Path) -> None:
    """Nothing here is an image that can be read, and the kind is what the owner must learn."""
    put(root, "{benign,malignant}/case{1,2}.dcm", bytes(128) + b"DICM" + bytes(200))


@source(
    train=8,
    classes=("control", "treated"),
    says=(".czi", ".roi"),
    colours={"control": (127,) * 3, "treated": (127,) * 3},
    unless_noted="float|value range",
)
def microscope_float_tiffs(root: Path) -> None:
    """ImageJ's TIFFs of float32 from 0 to 1, and of 16 bits; the microscope's own files beside."""
    pictures(root, "{control,treated}/well{1,2}.tif", made.floating)
    pictures(root, "{control,treated}/well{3,4}.tif", made.deep("TIFF", 65535))
    put(root, "{control,treated}/well1.czi", b"ZISRAWFILE" + bytes(100))
    put(root, "control/cells.roi", b"Iout" + bytes(60))


@source(train=6, classes=("heron", "stork"), says=(".nef", ".cr2", ".dng", ".xmp"))
def camera_raw_beside_jpeg(root: Path) -> None:
    """Raw files are TIFFs to a reader that trusts contents, which finds the thumbnail in them."""
    pictures(root, "{heron,stork}/DSC_000{1,2,3}.JPG")
    pictures(root, "heron/DSC_000{1,2}.NEF", made.raw_photo("NIKON"))
    pictures(root, "stork/DSC_000{1,2}.CR2", made.raw_photo("Canon"))
    pictures(root, "stork/DSC_0003.dng", made.raw_photo("Leica"))
    put(root, "{heron,stork}/DSC_0001.xmp", "<x:xmpmeta/>")


@source(refused=(".nef",))
def camera_raw_alone(root: Path) -> None:
    """A set of 160-pixel thumbnails is not what the owner means."""
    pictures(root, "{heron,stork}/DSC_000{1,2}.NEF", made.raw_photo("NIKON"))


@source(train=10, classes=("day", "night"), notes=("black|dark",), doubtful=True)
def video_frames_mostly_black(root: Path) -> None:
    """The camera had no light, or its cap on."""
    pictures(root, "day/frame_000{1,2,3,4,5}.jpg")
    pictures(root, "night/frame_000{1,2,3,4,5}.jpg", made.coloured((0, 0, 0)))


@source(refused=(".avi",))
def videos_alone(root: Path) -> None:
    """UCF101 as downloaded: frames must be cut from it first."""
    put(root, "{Archery,Biking}/v_g0{1,2}_c01.avi", b"RIFF\0\0\1\0AVI LIST" + bytes(200))


@source(images=({"train": 8}, {"train": 10}), classes=("kite", "windsurf"), says=(".mp4", ".lrv"))
def action_camera(root: Path) -> None:
    """GoPro: previews (.LRV) and thumbnails (.THM, which are small JPEGs) of its films."""
    pictures(root, "{kite,windsurf}/GOPR000{1,2,3,4}.JPG")
    pictures(root, "{kite,windsurf}/GOPR0005.THM")
    put(root, "{kite,windsurf}/GOPR0005.{MP4,LRV}", made.film("mp41"))
