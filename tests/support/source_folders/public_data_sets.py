"""Well-known data sets as their archives unpack, and folder names that mislead."""

from __future__ import annotations

from pathlib import Path

from tests.support.source_folders import images as made
from tests.support.source_folders.source import pictures, put, source


@source(
    train=4,
    classes=("Cat", "Dog"),
    says=(".docx", ".txt", "thumbs.db", "rejects.jsonl|empty file"),
    options=("--max-rejects", "0.5"),
)
def microsoft_cats_and_dogs(root: Path) -> None:
    """A wrapper with a licence beside it; number 666 and number 11702 are known to be damaged."""
    pictures(root, "PetImages/{Cat,Dog}/{0,1}.jpg")
    put(root, "PetImages/{Cat/666,Dog/11702}.jpg", b"")
    put(root, "PetImages/{Cat,Dog}/Thumbs.db", bytes(100))
    put(root, "{MSR-LA - 3467.docx,readme[1].txt}", "licence")


@source(
    train=6,
    test=2,
    classes=("Apple 10", "Apple Braeburn"),
    says=("test-multiple_fruits",),
    refused=("test-multiple_fruits",),
)
def fruits_360(root: Path) -> None:
    """Beside Training/ and Test/, a folder of unlabelled images that is named a test, too."""
    pictures(root, "fruits-360/Training/{Apple 10,Apple Braeburn}/{0,1,2}_100.jpg")
    pictures(root, "fruits-360/Test/{Apple 10,Apple Braeburn}/3_100.jpg")
    pictures(root, "fruits-360/test-multiple_fruits/{apple,pear}.jpg")
    put(root, "fruits-360/{LICENSE,readme.md}", "text")


@source(train=11, classes=tuple(map(str, range(11))), says=("test", "meta", ".csv"), refused=("test|meta",))
def traffic_signs(root: Path) -> None:
    """GTSRB: Train/ of numbers; Test/ without classes; Meta/ with a picture of each sign."""
    pictures(root, "Train/{0,1,2,3,4,5,6,7,8,9,10}/00000.png", made.in_format("PNG"))
    pictures(root, "{Test,Meta}/{0,1,2}.png", made.in_format("PNG"))
    put(root, "{Train,Test,Meta}.csv", "Path,ClassId\n")


@source(
    images=({"train": 4, "val": 2, "test": 2}, {"train": 8, "val": 4, "test": 4}),
    classes=("NORMAL", "PNEUMONIA"),
    says=("__macosx", "chest_xray"),
    refused=("chest_xray",),
)
def chest_x_rays(root: Path) -> None:
    """The archive holds the whole set twice, one in the other: one of them is named, or both."""
    for top in ("chest_xray", "chest_xray/chest_xray"):
        pictures(root, f"{top}/{{train/{{NORMAL,PNEUMONIA}}/{{1,2}},val/{{NORMAL,PNEUMONIA}}/3}}.jpeg")
        pictures(root, f"{top}/test/{{NORMAL,PNEUMONIA}}/4.jpeg")
    put(root, "chest_xray/__MACOSX/chest_xray/train/NORMAL/._1.jpeg", bytes(82))


@source(train=4, classes=("AnnualCrop", "Forest"))
def wrapper_with_a_number(root: Path) -> None:
    """EuroSAT's 2750/ is no class."""
    pictures(root, "2750/{AnnualCrop,Forest}/{1,2}.jpg")


@source(images=({"train": 4}, {"train": 2, "test": 2}), says=(".csv",), refused=("class|csv",))
def images_in_parts(root: Path) -> None:
    """HAM10000: folders of 5,000 images each, and the classes in a list, which must be named."""
    pictures(root, "HAM10000_images_part_{1/ISIC_{1,2},2/ISIC_{3,4}}.jpg")
    put(root, "{HAM10000_metadata,hmnist_28_28_RGB}.csv", "lesion_id,image_id,dx\n")


@source(train=6, classes=("bus", "car", "train"), refused=("train",))
def a_class_named_train(root: Path) -> None:
    """Vehicles in one split: the other classes must not be dropped for the split that one seems to be."""
    pictures(root, "{bus,car,train}/{1,2}.jpg")


@source(train=4, test=2, classes=("bus", "train"))
def a_class_named_train_in_splits(root: Path) -> None:
    """CIFAR-100's classes: test/train/ is of the test split."""
    pictures(root, "{train/{bus,train}/{1,2},test/{bus,train}/3}.png", made.in_format("PNG"))


@source(train=6, classes=("car", "loco"))
def file_names_with_split_words(root: Path) -> None:
    """A file's own name tells nothing in class folders: a photo of a crash test is no test image."""
    pictures(root, "car/{crash test 1,test_2,val d'Isere}.jpg")
    pictures(root, "loco/{old train,train-2,3}.jpg")


@source(
    train=8, val=2, classes=("cat", "dog"), says=("train_part1", "train_part2"), refused=("train_part1|train_part2",)
)
def training_in_two_parts(root: Path) -> None:
    """Two folders for one split: joined or refused, and said."""
    pictures(root, "{train_part1/{cat,dog}/{1,2},train_part2/{cat,dog}/{3,4},val/{cat,dog}/5}.jpg")


@source(images=({"train": 4, "val": 2},), notes=("val",), refused=("val",), doubtful=True)
def validation_of_other_classes(root: Path) -> None:
    """Synsets in one split, numbers in the other: the accuracy of such a set would be nought."""
    pictures(root, "{train/{n01440764,n01443537}/{1,2},val/{0,1}/3}.jpg")


@source(train=4, val=2, classes=("cat", "dog"), says=(".csv", ".txt"))
def splits_below_images(root: Path) -> None:
    """images/train and images/val, lists beside."""
    pictures(root, "images/{train/{cat,dog}/{1,2},val/{cat,dog}/3}.jpg")
    put(root, "{labels.csv,classes.txt}", "1,cat\n")


@source(train=6, classes=("-x", "[bold]dogs", "na\u00efve \U0001f431"))
def names_that_need_care(root: Path) -> None:
    """An option, markup, and characters beyond the 16 bits of UCS-2; a quote and a line break in the files' names."""
    pictures(root, "{-x,[bold]dogs,na\u00efve \U0001f431}/{it's 100%,two\nlines}.jpg")


@source(refused=("lfs|not an image", "4 of 4"), status=1)
def git_lfs_pointers(root: Path) -> None:
    """Cloned without git-lfs: each image is three lines of text, and the error says what all of them are."""
    put(root, "{cat,dog}/{1,2}.jpg", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
