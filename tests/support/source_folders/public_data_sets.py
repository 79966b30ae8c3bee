"""Well-known data sets in the form in which their archives unpack, and misleading folder names."""

from __future__ import annotations

from pathlib import Path

from tests.support.source_folders import images
from tests.support.source_folders.source import put_files, put_images, source


@source(
    train=4,
    classes=("Cat", "Dog"),
    messages=(".docx", ".txt", "thumbs.db", "rejects.jsonl|empty file"),
    options=("--max-rejects", "0.5"),
)
def microsoft_cats_and_dogs(root: Path) -> None:
    """A wrapper folder next to a license file; images 666 and 11702 are known to be damaged."""
    put_images(root, "PetImages/{Cat,Dog}/{0,1}.jpg")
    put_files(root, "PetImages/{Cat/666,Dog/11702}.jpg", b"")
    put_files(root, "PetImages/{Cat,Dog}/Thumbs.db", bytes(100))
    put_files(root, "{MSR-LA - 3467.docx,readme[1].txt}", "license")


@source(
    train=6,
    test=2,
    classes=("Apple 10", "Apple Braeburn"),
    messages=("test-multiple_fruits",),
    error=("test-multiple_fruits",),
)
def fruits_360(root: Path) -> None:
    """In addition to Training/ and Test/, there is a folder of unlabeled images also named like a test split."""
    put_images(root, "fruits-360/Training/{Apple 10,Apple Braeburn}/{0,1,2}_100.jpg")
    put_images(root, "fruits-360/Test/{Apple 10,Apple Braeburn}/3_100.jpg")
    put_images(root, "fruits-360/test-multiple_fruits/{apple,pear}.jpg")
    put_files(root, "fruits-360/{LICENSE,readme.md}", "text")


@source(train=11, classes=tuple(map(str, range(11))), messages=("test", "meta", ".csv"), error=("test|meta",))
def traffic_signs(root: Path) -> None:
    """GTSRB: Train/ with numbered classes, Test/ without classes, and Meta/ with an image of each sign."""
    put_images(root, "Train/{0,1,2,3,4,5,6,7,8,9,10}/00000.png", images.in_format("PNG"))
    put_images(root, "{Test,Meta}/{0,1,2}.png", images.in_format("PNG"))
    put_files(root, "{Train,Test,Meta}.csv", "Path,ClassId\n")


@source(
    images=({"train": 4, "val": 2, "test": 2}, {"train": 8, "val": 4, "test": 4}),
    classes=("NORMAL", "PNEUMONIA"),
    messages=("__macosx", "chest_xray"),
    error=("chest_xray",),
)
def chest_x_rays(root: Path) -> None:
    """The archive contains the data set twice, one copy inside the other; the error names a copy, or both are used."""
    for top in ("chest_xray", "chest_xray/chest_xray"):
        put_images(root, f"{top}/{{train/{{NORMAL,PNEUMONIA}}/{{1,2}},val/{{NORMAL,PNEUMONIA}}/3}}.jpeg")
        put_images(root, f"{top}/test/{{NORMAL,PNEUMONIA}}/4.jpeg")
    put_files(root, "chest_xray/__MACOSX/chest_xray/train/NORMAL/._1.jpeg", bytes(82))


@source(train=4, classes=("AnnualCrop", "Forest"))
def wrapper_with_a_number(root: Path) -> None:
    """EuroSAT's wrapper folder 2750/ is not a class."""
    put_images(root, "2750/{AnnualCrop,Forest}/{1,2}.jpg")


@source(images=({"train": 4}, {"train": 2, "test": 2}), messages=(".csv",), error=("class|csv",))
def images_in_parts(root: Path) -> None:
    """HAM10000: folders of 5,000 images each; the classes are in a list, which must be mentioned."""
    put_images(root, "HAM10000_images_part_{1/ISIC_{1,2},2/ISIC_{3,4}}.jpg")
    put_files(root, "{HAM10000_metadata,hmnist_28_28_RGB}.csv", "lesion_id,image_id,dx\n")


@source(train=6, classes=("bus", "car", "train"), error=("train",))
def a_class_named_train(root: Path) -> None:
    """Vehicle classes without splits: class 'train' must not be read as the training split."""
    put_images(root, "{bus,car,train}/{1,2}.jpg")


@source(train=4, test=2, classes=("bus", "train"))
def a_class_named_train_in_splits(root: Path) -> None:
    """CIFAR-100: images in test/train/ belong to the test split."""
    put_images(root, "{train/{bus,train}/{1,2},test/{bus,train}/3}.png", images.in_format("PNG"))


@source(train=6, classes=("car", "loco"))
def file_names_with_split_words(root: Path) -> None:
    """File names in class folders do not determine the split: a photo of a crash test is not a test image."""
    put_images(root, "car/{crash test 1,test_2,val d'Isere}.jpg")
    put_images(root, "loco/{old train,train-2,3}.jpg")


@source(
    train=8, val=2, classes=("cat", "dog"), messages=("train_part1", "train_part2"), error=("train_part1|train_part2",)
)
def training_in_two_parts(root: Path) -> None:
    """Two folders for one split must be merged or rejected, and reported."""
    put_images(root, "{train_part1/{cat,dog}/{1,2},train_part2/{cat,dog}/{3,4},val/{cat,dog}/5}.jpg")


@source(images=({"train": 4, "val": 2},), notes=("val",), error=("val",), rejected_by_strict=True)
def validation_of_other_classes(root: Path) -> None:
    """The splits have different class names, so the accuracy would be 0."""
    put_images(root, "{train/{n01440764,n01443537}/{1,2},val/{0,1}/3}.jpg")


@source(train=4, val=2, classes=("cat", "dog"), messages=(".csv", ".txt"))
def splits_below_images(root: Path) -> None:
    """images/train/ and images/val/, next to lists."""
    put_images(root, "images/{train/{cat,dog}/{1,2},val/{cat,dog}/3}.jpg")
    put_files(root, "{labels.csv,classes.txt}", "1,cat\n")


@source(train=6, classes=("-x", "[bold]dogs", "na\u00efve \U0001f431"))
def unusual_class_names(root: Path) -> None:
    """Classes named like an option and like markup, non-BMP characters, and quotes and line breaks in file names."""
    put_images(root, "{-x,[bold]dogs,na\u00efve \U0001f431}/{it's 100%,two\nlines}.jpg")


@source(error=("lfs|not an image", "4 of 4"), status=1)
def git_lfs_pointers(root: Path) -> None:
    """Cloned without git-lfs: each image is a text file of three lines, and the error must state this."""
    put_files(root, "{cat,dog}/{1,2}.jpg", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
