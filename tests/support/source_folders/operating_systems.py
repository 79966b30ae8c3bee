"""Class folders with what operating systems, file servers and programs leave in them."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.source_folders import images as made
from tests.support.source_folders.source import pictures, put, source

FORK = b"\0\5\x16\7" + bytes(60)


@source(train=6, classes=("daisy", "rose"), says=("__macosx", ".ds_store"))
def macos_zip(root: Path) -> None:
    """Unzipped elsewhere: a wrapper, resource forks in __MACOSX that are named like the images, a file Icon\\r."""
    pictures(root, "flowers/{daisy,rose}/{1,2,3}.jpg")
    put(root, "__MACOSX/flowers/{daisy,rose}/._{1,2,3}.jpg", FORK)
    put(root, "__MACOSX/._flowers", FORK)
    put(root, "{.DS_Store,flowers/.DS_Store,flowers/rose/.DS_Store}", bytes(200))
    put(root, "flowers/daisy/Icon\r", b"")


@source(train=4, val=2, classes=("daisy", "rose"), says=("._", ".ds_store"))
def macos_on_a_foreign_disk(root: Path) -> None:
    """Copied to exFAT: a resource fork beside each image, and beside each folder."""
    pictures(root, "{train/{daisy,rose}/{1,2},val/{daisy,rose}/3}.jpg")
    put(root, "train/{daisy,rose}/._{1,2}.jpg", FORK)
    put(root, "{._train,train/._rose,.DS_Store}", FORK)


@source(
    images=({"train": 8, "val": 4},),
    says=("thumbs.db", "desktop.ini", "zone.identifier"),
    notes=("case|capital",),
    refused=("case|capital",),
    doubtful=True,
)
def windows_share(root: Path) -> None:
    """Cats and cats were one folder there; streams of downloaded files became files of their own."""
    pictures(root, "train/{Cats,Dogs}/IMG ({1,2,3,4}).JPG")
    pictures(root, "val/{cats,Dogs}/IMG ({5,6}).JPG")
    put(root, "train/{Cats,Dogs}/Thumbs.db", b"\xd0\xcf\x11\xe0" + bytes(200))
    put(root, "train/Dogs/IMG (1).JPG:Zone.Identifier", "[ZoneTransfer]\r\nZoneId=3\r\n")
    put(root, "{desktop.ini,val/cats/desktop.ini}", "[.ShellClassInfo]\r\n")


@source(
    train=6,
    classes=("ham", "spam"),
    says=("$recycle.bin", "system volume information", "lost+found", ".trash", ".fseventsd"),
)
def usb_stick(root: Path) -> None:
    """Bins with deleted images in them, and the folders of three operating systems, are no classes."""
    pictures(root, "{ham,spam}/{1,2,3}.png", made.in_format("PNG"))
    pictures(root, "$RECYCLE.BIN/S-1-5-21/{$R1,$R2}.jpg")
    put(root, "$RECYCLE.BIN/S-1-5-21/desktop.ini", "[.ShellClassInfo]")
    put(root, "System Volume Information/{WPSettings.dat,IndexerVolumeGuid}", bytes(12))
    pictures(root, ".Trash-1000/files/old.jpg")
    put(root, ".Trash-1000/info/old.jpg.trashinfo", "[Trash Info]")
    put(root, ".fseventsd/fseventsd-uuid", bytes(36))
    put(root, "{.Spotlight-V100/VolumeConfiguration.plist,.Trashes/501}", bytes(30))
    (root / "lost+found").mkdir()


@source(train=6, val=2, classes=("alps", "beach"), says=("@eadir", "#recycle", "#snapshot"))
def nas_synology(root: Path) -> None:
    """Photo Station's thumbnails, a folder an image, and the bin and snapshots of the shared folder."""
    pictures(root, "{train/{alps,beach}/IMG_{1,2,3},val/{alps,beach}/IMG_4}.jpg")
    pictures(root, "train/{alps,beach}/@eaDir/IMG_{1,2,3}.jpg/SYNOPHOTO_THUMB_{M,XL}.jpg")
    put(root, "train/{alps,beach}/@eaDir/IMG_1.jpg@SynoEAStream", bytes(50))
    pictures(root, "{@eaDir/IMG_9.jpg/SYNOPHOTO_THUMB_M,#recycle/train/alps/IMG_0}.jpg")
    pictures(root, "#snapshot/GMT-2023.09.01/train/alps/IMG_1.jpg")


@source(train=6, classes=("alps", "beach"), says=(".@__thumb", "@recycle"))
def nas_qnap(root: Path) -> None:
    """QNAP's thumbnails and bin."""
    pictures(root, "{alps,beach}/IMG_{1,2,3}.jpg")
    pictures(root, "{alps,beach}/.@__thumb/{s100,default}IMG_{1,2,3}.jpg")
    pictures(root, "@Recycle/alps/IMG_0.jpg")


@source(train=6, classes=("ants", "bees"), says=(".ipynb_checkpoints", ".ipynb", "__pycache__"))
def jupyter_project(root: Path) -> None:
    """Copies of images in .ipynb_checkpoints at both levels; the notebook, weights and code beside the classes."""
    pictures(root, "{ants,bees}/{1,2,3}.jpg")
    pictures(root, "{ants,bees}/.ipynb_checkpoints/{1,2}-checkpoint.jpg")
    put(root, ".ipynb_checkpoints/train-checkpoint.ipynb", "{}")
    put(root, "{train.ipynb,model.h5,requirements.txt}", "{}")
    put(root, "__pycache__/data.cpython-312.pyc", bytes(40))


@source(
    train=8,
    classes=("Beagles", "Photos from 2019"),
    says=(".json", ".html"),
    refused=("google photos|takeout",),
)
def google_takeout(root: Path) -> None:
    """Two wrappers; a .json beside each image; edited and numbered copies."""
    album = "Takeout/Google Photos/{Beagles,Photos from 2019}"
    pictures(root, f"{album}/{{IMG_1,IMG_1-edited,IMG_1(1),Copy of IMG_2}}.jpg")
    put(root, f"{album}/{{metadata.json,IMG_1.jpg.json,IMG_1.jpg(1).json}}", "{}")
    put(root, "Takeout/archive_browser.html", "<html></html>")


@source(train=6, classes=("in focus", "out of focus"), says=(".dropbox", ".stversions", "conflicted|.tmp"))
def synced_folder(root: Path) -> None:
    """Dropbox and Syncthing: caches and old versions, and a file that is still being fetched."""
    pictures(root, "{in,out of} focus/{1,2,3}.jpg")
    pictures(root, ".dropbox.cache/2023-09-01/old.jpg")
    pictures(root, "in focus/.stversions/1~20230901-101500.jpg")
    put(root, "{.dropbox,.stfolder/syncthing-folder-1.txt}", b"")
    put(root, "in focus/.syncthing.4.jpg.tmp", made.jpeg(4)[:300])


@source(train=6, classes=("birthday", "wedding"), says=("picasa", ".picasaoriginals", ".lrcat"))
def family_photos(root: Path) -> None:
    """Picasa keeps the pictures as they were before its edits; Lightroom's catalogue lies beside the albums."""
    pictures(root, "{birthday,wedding}/{1,2,3}.jpg")
    pictures(root, "birthday/.picasaoriginals/{1,2}.jpg")
    put(root, "{birthday,wedding}/.picasa.ini", "[1.jpg]\nfilters=crop64=1\n")
    put(root, "{birthday/ZbThumbnail.info,wedding/Picasa.ini,Lightroom Catalog.lrcat}", bytes(20))


@source(
    train=10,
    classes=("cats", "dogs"),
    says=(".svg", "rejects.jsonl|not an image|empty file"),
    options=("--max-rejects", "0.6"),
)
def web_scrape(root: Path) -> None:
    """Error pages and nothing at all under .jpg, WebP under .jpg, AVIF, no suffix, a query behind the suffix."""
    pictures(root, "{cats,dogs}/{1.jpg,2.jpg?width=300}")
    put(root, "{cats,dogs}/3.jpg", "<!DOCTYPE html><html><body>403 Forbidden</body></html>")
    put(root, "{cats,dogs}/4.jpg", b"")
    pictures(root, "{cats,dogs}/5.jpg", made.in_format("WEBP"))
    pictures(root, "{cats,dogs}/6.avif", made.in_format("AVIF"))
    pictures(root, "{cats,dogs}/7")
    put(root, "{cats,dogs}/8.svg", "<svg xmlns='http://www.w3.org/2000/svg'/>")
    put(root, "cats/9.jpg.crdownload", made.jpeg(9)[:400])


@source(images=({"train": 6}, {"train": 10}), classes=("news", "shop"))
def tracking_pixels(root: Path) -> None:
    """Pages saved with their images: GIFs of one pixel are used, or named; no file is lost."""
    pictures(root, "{news,shop}/{1,2,3}.jpg")
    pictures(root, "{news,shop}/{pixel,spacer}.gif", lambda seed: made.encoded(made.noise(seed, size=(1, 1)), "GIF"))


@source(
    train=6,
    classes=("cat", "dog"),
    says=("rejects.jsonl|no such file|leads to nothing|broken link",),
    options=("--max-rejects", "0.5"),
)
def links_to_a_pool(root: Path) -> None:
    """Each image a link to a pool beside the source, one folder a link itself, one link to nothing."""
    pictures(root, "../pool/{1,2,3}.jpg")
    pictures(root, "../pool/dog/{4,5,6}.jpg")
    (root / "cat").mkdir()
    for i in (1, 2, 3):
        (root / f"cat/{i}.jpg").symlink_to(root / f"../pool/{i}.jpg")
    (root / "cat/4.jpg").symlink_to(root / "../pool/gone.jpg")
    (root / "dog").symlink_to(root / "../pool/dog")


@source(train=6, classes=("dialog", "menu"), colours={"dialog": (227, 127, 127), "menu": (227, 127, 127)})
def screenshots_with_alpha(root: Path) -> None:
    """What is transparent is white on the screen, whatever colour is stored there."""
    pictures(root, "{dialog,menu}/Screenshot 2023-09-01 at 11.0{1,2,3}.png", made.cut_out)


@source(
    train=9, classes=("laugh", "wave", "wink"), colours={name: (200, 120, 40) for name in ("laugh", "wave", "wink")}
)
def animated_stickers(root: Path) -> None:
    """GIF, WebP and PNG that move: the first frame counts."""
    for name, kind in (("laugh", "GIF"), ("wave", "WEBP"), ("wink", "PNG")):
        pictures(root, f"{name}/{{1,2,3}}.{kind.lower()}", made.animated(kind, (200, 120, 40), (2, 2, 2)))


@source(train=2, classes=("bank", "news"), says=(".ico",))
def favicons(root: Path) -> None:
    """ICO files, which are no images here but said; one of them is a PNG under .ico."""
    pictures(root, "{bank,news}/site{1,2,3}.ico", made.in_format("ICO", sizes=[(32, 32), (16, 16)]))
    pictures(root, "{bank,news}/site4.ico", made.in_format("PNG"))


@source(train=12, classes=("s1", "s10", "s2"), says=("readme",))
def older_formats(root: Path) -> None:
    """The ORL faces' .pgm, and what image tools of all ages write."""
    pictures(root, "{s1,s10,s2}/1.pgm", lambda seed: made.encoded(made.noise(seed).convert("L"), "PPM"))
    for suffix, kind in (("ppm", "PPM"), ("bmp", "BMP"), ("tga", "TGA"), ("pcx", "PCX"), ("jp2", "JPEG2000")):
        pictures(root, f"s1/2.{suffix}", made.in_format(kind))
    pictures(root, "s10/2.sgi", made.in_format("SGI"))
    pictures(root, "s2/{2.jfif,3.jpe,4.JPEG}")
    put(root, "README", "Our database of faces")


@source(images=({"train": 4, "val": 4},), notes=("caf",), refused=("caf",), doubtful=True)
def unicode_forms(root: Path) -> None:
    """macOS decomposes accents: the two folders look alike, and are two to this file system."""
    pictures(root, "{train/{caf\u00e9,pub},val/{cafe\u0301,pub}}/{1,2}.jpg")


@source(images=({"train": 4, "val": 4},), notes=("daisy|space",), refused=("daisy|space",), doubtful=True)
def trailing_space(root: Path) -> None:
    """A class folder with a space behind its name in one of the splits."""
    pictures(root, "{train/{daisy ,rose},val/{daisy,rose}}/{1,2}.jpg")


@source(train=4, says=(".ini",))
def names_of_another_code_page(root: Path) -> None:
    """Unzipped from an archive of Windows': bytes that are no UTF-8."""
    for name in (b"caf\x82", b"th\x82"):
        folder = bytes(root) + b"/" + name
        os.mkdir(folder)
        for i in (b"1", b"2"):
            with open(folder + b"/\x84" + i + b".jpg", "wb") as file:
                file.write(made.jpeg(int(i)))
    put(root, "desktop.ini", "")


@source(train=6, classes=("cat", "dog"), notes=("bird",), refused=("bird",), doubtful=True)
def an_empty_class(root: Path) -> None:
    """The scrape of one class found nothing."""
    pictures(root, "{cat,dog}/{1,2,3}.jpg")
    (root / "bird").mkdir()


@source(train=6, val=2, classes=("cat", "dog"), says=("collage", "unsorted"))
def loose_images(root: Path) -> None:
    """Images beside the class folders: they have no class, and that is said."""
    pictures(root, "{train/{cat,dog}/{1,2,3},val/{cat,dog}/4}.jpg")
    pictures(root, "{collage,train/unsorted1,train/unsorted2}.jpg")


@source(train=24, classes=tuple(map(str, range(12))), says=("numeric|natural|number",))
def numbered_classes(root: Path) -> None:
    """Folders 0 to 11: label 2 is folder 2, not folder 10."""
    pictures(root, "{0,1,2,3,4,5,6,7,8,9,10,11}/{a,b}.png", made.in_format("PNG"))


@source(train=10, classes=("cat", "dog"))
def nested_folders(root: Path) -> None:
    """torchvision's ImageFolder takes what lies below a class folder for that class; names may repeat."""
    pictures(root, "{cat,dog}/{,2021/,2022/a/,2022/b/,x y/}1.jpg")
