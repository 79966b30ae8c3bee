"""Folders as data-set hubs, competitions and annotation programs give them out."""

from __future__ import annotations

from pathlib import Path

from tests.support.source_folders import images as made
from tests.support.source_folders.source import pictures, put, source

INTEL = ("buildings", "forest", "sea")
ONE_CLASS = "one class|1 class|single class|only class"


@source(train=6, classes=("cat", "dog"), says=("test", ".csv"), refused=("test",))
def kaggle_competition(root: Path) -> None:
    """The test images have no labels, so they are in no class folders."""
    pictures(root, "train/{cat,dog}/{1,2,3}.jpg")
    pictures(root, "test/{1001,1002,1003,1004}.jpg")
    put(root, "{train.csv,sample_submission.csv}", "id,label\n1001,cat\n")


@source(train=4, val=2, classes=("n01440764", "n01443537"), says=("test", "Annotations", ".csv"), lists=2)
def kaggle_imagenet(root: Path) -> None:
    """ImageNet's competition: boxes, lists, and test images without labels beside what is used."""
    pictures(root, "ILSVRC/Data/CLS-LOC/train/{n01440764,n01443537}/x_{0,1}.JPEG")
    pictures(root, "ILSVRC/Data/CLS-LOC/{val/ILSVRC2012_val_0000000{1,2},test/ILSVRC2012_test_0000000{1,2}}.JPEG")
    put(root, "ILSVRC/Annotations/CLS-LOC/train/n01440764/x_0.xml", "<annotation/>")
    put(root, "ILSVRC/ImageSets/CLS-LOC/{train_cls,val,test}.txt", "x_0 1\n")
    put(root, "LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    labels = "ILSVRC2012_val_00000001,n01440764 1 2 3 4\nILSVRC2012_val_00000002,n01443537 1 2 3 4\n"
    put(root, "LOC_{val_solution,train_solution,sample_submission}.csv", f"ImageId,PredictionString\n{labels}")


@source(refused=("class",))
def kaggle_dogs_vs_cats(root: Path) -> None:
    """The class is in the file's name."""
    pictures(root, "train/{cat,dog}.{0,1,2}.jpg")
    pictures(root, "test1/{1,2}.jpg")


@source(train=6, test=3, classes=INTEL, says=("seg_pred",), refused=("seg_pred",))
def kaggle_intel_scenes(root: Path) -> None:
    """Each split folder twice, one in the other, and a third without classes."""
    pictures(root, "seg_train/seg_train/{buildings,forest,sea}/{1,2}.jpg")
    pictures(root, "seg_test/seg_test/{buildings,forest,sea}/3.jpg")
    pictures(root, "seg_pred/seg_pred/{4,5,6}.jpg")


PLANTS = (
    "Cherry_(including_sour)___healthy",
    "Corn_(maize)___Common_rust_",
    "Pepper,_bell___Bacterial_spot",
    "Tomato___Spider_mites Two-spotted_spider_mite",
)


@source(train=8, val=4, classes=PLANTS, says=("test",), refused=("test",))
def kaggle_plant_diseases(root: Path) -> None:
    """Two wrappers of one name; class names with commas, brackets and spaces; test images in one folder 'test'."""
    wrapper = "New Plant Diseases Dataset(Augmented)/" * 2
    for name in PLANTS:
        put(root, f"{wrapper}train/{name}/a.JPG", made.jpeg(len(name)))
        put(root, f"{wrapper}train/{name}/b c (1).JPG", made.jpeg(100 + len(name)))
        put(root, f"{wrapper}valid/{name}/c.JPG", made.jpeg(200 + len(name)))
    pictures(root, "test/test/{AppleCedarRust1,PotatoHealthy1,PotatoHealthy2}.JPG")


@source(refused=("class|csv",), images=({"train": 6},), notes=(ONE_CLASS,), says=(".csv",))
def labels_in_a_csv(root: Path) -> None:
    """All images in one folder, their labels in a list beside it: never a set of one class without a word."""
    pictures(root, "images/{1,2,3,4,5,6}.jpg")
    put(root, "labels.csv", "image,label\n1.jpg,cat\n2.jpg,dog\n")


@source(refused=("class",))
def flat_images(root: Path) -> None:
    """No folders at all."""
    pictures(root, "{cat1,cat2,dog1,dog2}.jpg")


@source(train=6, test=2, classes=("cat", "dog"), says=(".md", ".csv", ".git", ".cache"))
def hugging_face_image_folder(root: Path) -> None:
    """As `hf download` or git leave it: captions in metadata.csv, a README, caches."""
    pictures(root, "{train/{cat,dog}/{1,2,3},test/{cat,dog}/4}.jpg")
    put(root, "train/metadata.csv", "file_name,text\ncat/1.jpg,a cat\n")
    put(root, "{README.md,.gitattributes,.git/HEAD,.git/objects/pack/pack-1.idx}", "text")
    put(root, ".cache/huggingface/download/train/cat/{1,2,3}.jpg.metadata", "etag")


@source(refused=("class|csv|jsonl",))
def hugging_face_metadata_labels(root: Path) -> None:
    """The label is a column of metadata.jsonl, and the images lie flat."""
    pictures(root, "{train/{1,2,3},test/4}.png", made.in_format("PNG"))
    put(root, "{train,test}/metadata.jsonl", '{"file_name": "1.png", "label": "cat"}\n')


@source(refused=(".arrow",))
def hugging_face_save_to_disk(root: Path) -> None:
    """Arrow files are no Parquet; the owner must learn that they were seen."""
    put(root, "{train,test}/data-00000-of-00001.arrow", b"ARROW1" + bytes(100))
    put(root, "{dataset_dict.json,train/state.json,train/dataset_info.json,test/state.json}", "{}")


@source(train=6, val=2, test=4, classes=("corn", "weed"), says=(".txt",))
def roboflow_classification(root: Path) -> None:
    """valid for validation, a test split, and readmes."""
    pictures(root, "{train/{corn,weed}/{1,2,3},valid/{corn,weed}/4,test/{corn,weed}/{5,6}}_jpg.rf.0a1b.jpg")
    put(root, "README.{roboflow,dataset}.txt", "Exported by roboflow.com")


@source(refused=("class",))
def yolo_detection(root: Path) -> None:
    """Boxes, not classes: 'images' and 'labels' are no class names, nor is either of them one to be removed."""
    pictures(root, "images/{train/{1,2},val/3}.jpg")
    put(root, "labels/{train/{1,2},val/3}.txt", "0 .5 .5 .2 .2\n")
    put(root, "data.yaml", "nc: 2\nnames: [cat, dog]\n")


@source(refused=("jpegimages|annotations|imagesets",))
def voc_detection(root: Path) -> None:
    """Pascal VOC: images, masks, boxes and lists, each in a folder that is no class."""
    pictures(root, "JPEGImages/2007_00000{1,2,3}.jpg")
    pictures(root, "SegmentationClass/2007_00000{1,2,3}.png", made.in_format("PNG"))
    put(root, "Annotations/2007_00000{1,2,3}.xml", "<annotation/>")
    put(root, "ImageSets/Main/{train,val}.txt", "2007_000001\n")


@source(refused=("train2017|class",))
def coco_images(root: Path) -> None:
    """Two folders of images and one of boxes: neither a year nor a list is a class."""
    pictures(root, "{train2017/0000{1,2,3},val2017/0000{4,5}}.jpg")
    put(root, "annotations/instances_{train,val}2017.json", "{}")


@source(refused=("class",))
def label_studio_export(root: Path) -> None:
    """Label Studio's and CVAT's exports hold the choices in a list beside the images."""
    pictures(root, "images/0a1b-IMG_{1,2,3}.jpg")
    put(root, "labels/0a1b-IMG_{1,2,3}.txt", "0 .5 .5 1 1\n")
    put(root, "{classes.txt,notes.json,result.json}", "cat\ndog\n")


@source(
    images=({"train": 6}, {"train": 6, "val": 2}),
    classes=("n01443537", "n01629819"),
    says=("val", ".txt"),
    refused=("val",),
    lists=3,
)
def tiny_imagenet(root: Path) -> None:
    """The validation labels are in a list; val/images is no class, nor is test/images."""
    pictures(root, "tiny-imagenet-200/train/{n01443537,n01629819}/images/x_{0,1,2}.JPEG")
    put(root, "tiny-imagenet-200/train/{n01443537,n01629819}/boxes.txt", "x_0.JPEG\t0\t0\t9\t9\n")
    pictures(root, "tiny-imagenet-200/val/images/val_{0,1}.JPEG")
    put(
        root,
        "tiny-imagenet-200/val/val_annotations.txt",
        "val_0.JPEG\tn01443537\t0\t0\t9\t9\nval_1.JPEG\tn01629819\t0\t0\t9\t9\n",
    )
    pictures(root, "tiny-imagenet-200/test/images/test_{0,1,2}.JPEG")
    put(root, "tiny-imagenet-200/{wnids,words}.txt", "n01443537\tgoldfish\nn01629819\tsalamander\n")


BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross")


@source(train=6, classes=BIRDS, says=("parts", "train_test_split"), refused=("attributes|parts|images/",))
def cub_birds(root: Path) -> None:
    """The class folders are in images/; other folders beside it hold lists."""
    pictures(root, f"images/{{{','.join(BIRDS)}}}/{{1,2,3}}.jpg")
    put(root, "{attributes/attributes,parts/part_locs,classes,train_test_split}.txt", "1 1\n")


@source(refused=("class",), images=({"train": 4},), notes=(ONE_CLASS,), says=(".mat",))
def oxford_flowers(root: Path) -> None:
    """All images in jpg/, labels and splits in MATLAB files."""
    pictures(root, "jpg/image_0000{1,2,3,4}.jpg")
    put(root, "{imagelabels,setid}.mat", b"MATLAB 5.0 MAT-file" + bytes(200))


@source(train=10, test=10, classes=tuple("0123456789"), says=("readme",))
def mnist_as_png(root: Path) -> None:
    """A wrapper round training/ and testing/ of digits."""
    digit = "{0,1,2,3,4,5,6,7,8,9}"
    pictures(root, f"mnist_png/{{training/{digit}/1,testing/{digit}/2}}.png", made.in_format("PNG"))
    put(root, "mnist_png/README", "digits")


@source(train=3, test=4, classes=("broken_large", "good"), notes=("broken_large",), says=("ground_truth", ".txt"))
def mvtec_anomalies(root: Path) -> None:
    """Faults occur in the test split alone, and their masks are no images to learn from."""
    pictures(root, "{train/good/00{0,1,2},test/{good,broken_large}/00{3,4}}.png", made.in_format("PNG"))
    pictures(root, "ground_truth/broken_large/00{3,4}_mask.png", made.in_format("PNG"))
    put(root, "{license,readme}.txt", "CC BY-NC-SA")


@source(train=4, test=4, classes=("apple", "pear"), refused=("test",))
def splits_below_the_classes(root: Path) -> None:
    """CLASS/train and CLASS/test: the test images must not be trained on without a word."""
    pictures(root, "{apple,pear}/{train,test}/{1,2}.jpg")


@source(train=4, val=2, test=2, classes=("cat", "dog"))
def splits_in_full_words(root: Path) -> None:
    """Training, Validation and Testing."""
    pictures(root, "{Training/{cat,dog}/{1,2},Validation/{cat,dog}/3,Testing/{cat,dog}/4}.jpg")


@source(train=4, val=2, test=2, classes=("cat", "dog"))
def splits_with_set_behind(root: Path) -> None:
    """train_set, val_set and test_set."""
    pictures(root, "{train_set/{cat,dog}/{1,2},val_set/{cat,dog}/3,test_set/{cat,dog}/4}.jpg")


@source(train=8, classes=("alpine", "testimonials", "trainers", "valley"))
def classes_that_begin_like_splits(root: Path) -> None:
    """A valley is no validation split, a trainer no training split."""
    pictures(root, "{alpine,valley,trainers,testimonials}/{1,2}.jpg")


@source(refused=(".zip",))
def archives_not_unpacked(root: Path) -> None:
    """A class a zip: the owner must be told to unpack them, or get their classes."""
    put(root, "{cat,dog}.zip", b"PK\3\4" + bytes(100))


@source(refused=("cifar|batch",))
def cifar_pickles(root: Path) -> None:
    """The Python version of CIFAR-10."""
    put(root, "cifar-10-batches-py/{batches.meta,data_batch_1,test_batch}", b"\x80\2}q" + bytes(100))
    put(root, "cifar-10-batches-py/readme.html", "<html></html>")
