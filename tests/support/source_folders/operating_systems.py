"""Class folders that contain files of operating systems, file servers, and other programs."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.source_folders import images
from tests.support.source_folders.source import put_files, put_images, source

FORK = b"\0\5\x16\7" + bytes(60)


@source(train=6, classes=("daisy", "rose"), messages=("__macosx", ".ds_store"))
def macos_zip(root: Path) -> None:
    """A macOS zip: a wrapper folder, resource forks in __MACOSX named like the images, and a file Icon\\r."""
    put_images(root, "flowers/{daisy,rose}/{1,2,3}.jpg")
    put_files(root, "__MACOSX/flowers/{daisy,rose}/._{1,2,3}.jpg", FORK)
    put_files(root, "__MACOSX/._flowers", FORK)
    put_files(root, "{.DS_Store,flowers/.DS_Store,flowers/rose/.DS_Store}", bytes(200))
    put_files(root, "flowers/daisy/Icon\r", b"")


@source(train=4, val=2, classes=("daisy", "rose"), messages=("._", ".ds_store"))
def macos_on_exfat(root: Path) -> None:
    """Copied to exFAT: a resource fork next to each image and folder."""
    put_images(root, "{train/{daisy,rose}/{1,2},val/{daisy,rose}/3}.jpg")
    put_files(root, "train/{daisy,rose}/._{1,2}.jpg", FORK)
    put_files(root, "{._train,train/._rose,.DS_Store}", FORK)


@source(
    images=({"train": 8, "val": 4},),
    messages=("thumbs.db", "desktop.ini", "zone.identifier"),
    notes=("case|capital",),
    error=("case|capital",),
    rejected_by_strict=True,
)
def windows_share(root: Path) -> None:
    """Cats and cats were the same folder on Windows; data streams of downloaded files became separate files."""
    put_images(root, "train/{Cats,Dogs}/IMG ({1,2,3,4}).JPG")
    put_images(root, "val/{cats,Dogs}/IMG ({5,6}).JPG")
    put_files(root, "train/{Cats,Dogs}/Thumbs.db", b"\xd0\xcf\x11\xe0" + bytes(200))
    put_files(root, "train/Dogs/IMG (1).JPG:Zone.Identifier", "[ZoneTransfer]\r\nZoneId=3\r\n")
    put_files(root, "{desktop.ini,val/cats/desktop.ini}", "[.ShellClassInfo]\r\n")


@source(
    train=6,
    classes=("ham", "spam"),
    messages=("$recycle.bin", "system volume information", "lost+found", ".trash", ".fseventsd"),
)
def usb_stick(root: Path) -> None:
    """Recycle bins with deleted images, and system folders of three operating systems, are not classes."""
    put_images(root, "{ham,spam}/{1,2,3}.png", images.in_format("PNG"))
    put_images(root, "$RECYCLE.BIN/S-1-5-21/{$R1,$R2}.jpg")
    put_files(root, "$RECYCLE.BIN/S-1-5-21/desktop.ini", "[.ShellClassInfo]")
    put_files(root, "System Volume Information/{WPSettings.dat,IndexerVolumeGuid}", bytes(12))
    put_images(root, ".Trash-1000/files/old.jpg")
    put_files(root, ".Trash-1000/info/old.jpg.trashinfo", "[Trash Info]")
    put_files(root, ".fseventsd/fseventsd-uuid", bytes(36))
    put_files(root, "{.Spotlight-V100/VolumeConfiguration.plist,.Trashes/501}", bytes(30))
    (root / "lost+found").mkdir()


@source(train=6, val=2, classes=("alps", "beach"), messages=("@eadir", "#recycle", "#snapshot"))
def nas_synology(root: Path) -> None:
    """Photo Station's thumbnails in a folder per image, and the recycle bin and snapshots of the shared folder."""
    put_images(root, "{train/{alps,beach}/IMG_{1,2,3},val/{alps,beach}/IMG_4}.jpg")
    put_images(root, "train/{alps,beach}/@eaDir/IMG_{1,2,3}.jpg/SYNOPHOTO_THUMB_{M,XL}.jpg")
    put_files(root, "train/{alps,beach}/@eaDir/IMG_1.jpg@SynoEAStream", bytes(50))
    put_images(root, "{@eaDir/IMG_9.jpg/SYNOPHOTO_THUMB_M,#recycle/train/alps/IMG_0}.jpg")
    put_images(root, "#snapshot/GMT-2023.09.01/train/alps/IMG_1.jpg")


@source(train=6, classes=("alps", "beach"), messages=(".@__thumb", "@recycle"))
def nas_qnap(root: Path) -> None:
    """QNAP's thumbnails and recycle bin."""
    put_images(root, "{alps,beach}/IMG_{1,2,3}.jpg")
    put_images(root, "{alps,beach}/.@__thumb/{s100,default}IMG_{1,2,3}.jpg")
    put_images(root, "@Recycle/alps/IMG_0.jpg")


@source(train=6, classes=("ants", "bees"), messages=(".ipynb_checkpoints", ".ipynb", "__pycache__"))
def jupyter_project(root: Path) -> None:
    """Image copies in .ipynb_checkpoints at both levels, and a notebook, weights, and code next to the classes."""
    put_images(root, "{ants,bees}/{1,2,3}.jpg")
    put_images(root, "{ants,bees}/.ipynb_checkpoints/{1,2}-checkpoint.jpg")
    put_files(root, ".ipynb_checkpoints/train-checkpoint.ipynb", "{}")
    put_files(root, "{train.ipynb,model.h5,requirements.txt}", "{}")
    put_files(root, "__pycache__/data.cpython-312.pyc", bytes(40))


@source(
    train=8,
    classes=("Beagles", "Photos from 2019"),
    messages=(".json", ".html"),
    error=("google photos|takeout",),
)
def google_takeout(root: Path) -> None:
    """Two wrapper folders, a .json file per image, and edited and numbered copies."""
    album = "Takeout/Google Photos/{Beagles,Photos from 2019}"
    put_images(root, f"{album}/{{IMG_1,IMG_1-edited,IMG_1(1),Copy of IMG_2}}.jpg")
    put_files(root, f"{album}/{{metadata.json,IMG_1.jpg.json,IMG_1.jpg(1).json}}", "{}")
    put_files(root, "Takeout/archive_browser.html", "<html></html>")


@source(train=6, classes=("in focus", "out of focus"), messages=(".dropbox", ".stversions", "conflicted|.tmp"))
def synced_folder(root: Path) -> None:
    """Dropbox and Syncthing: caches, old versions, and a file that is still being downloaded."""
    put_images(root, "{in,out of} focus/{1,2,3}.jpg")
    put_images(root, ".dropbox.cache/2023-09-01/old.jpg")
    put_images(root, "in focus/.stversions/1~20230901-101500.jpg")
    put_files(root, "{.dropbox,.stfolder/syncthing-folder-1.txt}", b"")
    put_files(root, "in focus/.syncthing.4.jpg.tmp", images.jpeg(4)[:300])


@source(train=6, classes=("birthday", "wedding"), messages=("picasa", ".picasaoriginals", ".lrcat"))
def family_photos(root: Path) -> None:
    """Picasa keeps the unedited images; Lightroom's catalog is next to the albums."""
    put_images(root, "{birthday,wedding}/{1,2,3}.jpg")
    put_images(root, "birthday/.picasaoriginals/{1,2}.jpg")
    put_files(root, "{birthday,wedding}/.picasa.ini", "[1.jpg]\nfilters=crop64=1\n")
    put_files(root, "{birthday/ZbThumbnail.info,wedding/Picasa.ini,Lightroom Catalog.lrcat}", bytes(20))


@source(
    train=10,
    classes=("cats", "dogs"),
    messages=(".svg", "rejects.jsonl|not an image|empty file"),
    options=("--max-rejects", "0.6"),
)
def web_scrape(root: Path) -> None:
    """Error pages and empty files named .jpg, WebP named .jpg, AVIF, no suffix, and a query after the suffix."""
    put_images(root, "{cats,dogs}/{1.jpg,2.jpg?width=300}")
    put_files(root, "{cats,dogs}/3.jpg", "<!DOCTYPE html><html><body>403 Forbidden</body></html>")
    put_files(root, "{cats,dogs}/4.jpg", b"")
    put_images(root, "{cats,dogs}/5.jpg", images.in_format("WEBP"))
    put_images(root, "{cats,dogs}/6.avif", images.in_format("AVIF"))
    put_images(root, "{cats,dogs}/7")
    put_files(root, "{cats,dogs}/8.svg", "<svg xmlns='http://www.w3.org/2000/svg'/>")
    put_files(root, "cats/9.jpg.crdownload", images.jpeg(9)[:400])


@source(images=({"train": 6}, {"train": 10}), classes=("news", "shop"))
def tracking_pixels(root: Path) -> None:
    """Saved web pages: GIFs of one pixel are used or rejected, but always counted."""
    put_images(root, "{news,shop}/{1,2,3}.jpg")
    put_images(root, "{news,shop}/{pixel,spacer}.gif", images.one_pixel_gif)


@source(
    train=6,
    classes=("cat", "dog"),
    messages=("rejects.jsonl|no such file|leads to nothing|broken link",),
    options=("--max-rejects", "0.5"),
)
def links_to_a_pool(root: Path) -> None:
    """Each image is a link to a pool outside the source, one folder is a link, and one link is broken."""
    put_images(root, "../pool/{1,2,3}.jpg")
    put_images(root, "../pool/dog/{4,5,6}.jpg")
    (root / "cat").mkdir()
    for i in (1, 2, 3):
        (root / f"cat/{i}.jpg").symlink_to(root / f"../pool/{i}.jpg")
    (root / "cat/4.jpg").symlink_to(root / "../pool/gone.jpg")
    (root / "dog").symlink_to(root / "../pool/dog")


@source(train=6, classes=("dialog", "menu"), colors={"dialog": (227, 127, 127), "menu": (227, 127, 127)})
def screenshots_with_alpha(root: Path) -> None:
    """Transparent pixels are white, regardless of their stored color."""
    put_images(root, "{dialog,menu}/Screenshot 2023-09-01 at 11.0{1,2,3}.png", images.cut_out)


@source(
    train=9, classes=("laugh", "wave", "wink"), colors={name: (200, 120, 40) for name in ("laugh", "wave", "wink")}
)
def animated_stickers(root: Path) -> None:
    """Animated GIF, WebP, and PNG: the first frame is used."""
    for name, kind in (("laugh", "GIF"), ("wave", "WEBP"), ("wink", "PNG")):
        put_images(root, f"{name}/{{1,2,3}}.{kind.lower()}", images.animated(kind, (200, 120, 40), (2, 2, 2)))


@source(train=2, classes=("bank", "news"), messages=(".ico",))
def favicons(root: Path) -> None:
    """ICO files are not used, but reported; one of them is a PNG named .ico."""
    put_images(root, "{bank,news}/site{1,2,3}.ico", images.in_format("ICO", sizes=[(32, 32), (16, 16)]))
    put_images(root, "{bank,news}/site4.ico", images.in_format("PNG"))


@source(train=12, classes=("s1", "s10", "s2"), messages=("readme",))
def older_formats(root: Path) -> None:
    """The .pgm files of the ORL faces, and other old image formats."""
    put_images(root, "{s1,s10,s2}/1.pgm", lambda seed: images.encoded(images.noise(seed).convert("L"), "PPM"))
    for suffix, kind in (("ppm", "PPM"), ("bmp", "BMP"), ("tga", "TGA"), ("pcx", "PCX"), ("jp2", "JPEG2000")):
        put_images(root, f"s1/2.{suffix}", images.in_format(kind))
    put_images(root, "s10/2.sgi", images.in_format("SGI"))
    put_images(root, "s2/{2.jfif,3.jpe,4.JPEG}")
    put_files(root, "README", "Our database of faces")


@source(images=({"train": 4, "val": 4},), notes=("caf",), error=("caf",), rejected_by_strict=True)
def unicode_forms(root: Path) -> None:
    """macOS decomposes accents: the two folders look the same, but are different folders."""
    put_images(root, "{train/{caf\u00e9,pub},val/{cafe\u0301,pub}}/{1,2}.jpg")


@source(images=({"train": 4, "val": 4},), notes=("daisy|space",), error=("daisy|space",), rejected_by_strict=True)
def trailing_space(root: Path) -> None:
    """A class folder has a trailing space in its name in one of the splits."""
    put_images(root, "{train/{daisy ,rose},val/{daisy,rose}}/{1,2}.jpg")


@source(train=4, messages=(".ini",))
def names_of_another_code_page(root: Path) -> None:
    """Unzipped from a Windows archive: names that are not UTF-8."""
    for name in (b"caf\x82", b"th\x82"):
        folder = bytes(root) + b"/" + name
        os.mkdir(folder)
        for i in (b"1", b"2"):
            with open(folder + b"/\x84" + i + b".jpg", "wb") as file:
                file.write(images.jpeg(int(i)))
    put_files(root, "desktop.ini", "")


@source(train=6, classes=("cat", "dog"), notes=("bird",), error=("bird",), rejected_by_strict=True)
def an_empty_class(root: Path) -> None:
    """One class folder is empty."""
    put_images(root, "{cat,dog}/{1,2,3}.jpg")
    (root / "bird").mkdir()


@source(train=6, val=2, classes=("cat", "dog"), messages=("collage", "unsorted"))
def loose_images(root: Path) -> None:
    """Images next to the class folders have no class, which is reported."""
    put_images(root, "{train/{cat,dog}/{1,2,3},val/{cat,dog}/4}.jpg")
    put_images(root, "{collage,train/unsorted1,train/unsorted2}.jpg")


@source(train=24, classes=tuple(map(str, range(12))), messages=("numeric|natural|number",))
def numbered_classes(root: Path) -> None:
    """Folders 0 to 11: label 2 is folder 2, not folder 10."""
    put_images(root, "{0,1,2,3,4,5,6,7,8,9,10,11}/{a,b}.png", images.in_format("PNG"))


@source(train=10, classes=("cat", "dog"))
def nested_folders(root: Path) -> None:
    """As in torchvision's ImageFolder, images in subfolders of a class folder belong to the class."""
    put_images(root, "{cat,dog}/{,2021/,2022/a/,2022/b/,x y/}1.jpg")
