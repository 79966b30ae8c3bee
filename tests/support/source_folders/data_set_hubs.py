"""Folders as distributed by data set hubs, competitions, and annotation tools."""

from __future__ import annotations

from pathlib import Path

from tests.support.source_folders import images
from tests.support.source_folders.source import put_files, put_images, source

INTEL = ("buildings", "forest", "sea")
ONE_CLASS = "one class|1 class|single class|only class"


@source(train=6, classes=("cat", "dog"), messages=("test", ".csv"), error=("test",))
def kaggle_competition(root: Path) -> None:
    """The test images have no labels and no class folders."""
    put_images(root, "train/{cat,dog}/{1,2,3}.jpg")
    put_images(root, "test/{1001,1002,1003,1004}.jpg")
    put_files(root, "{train.csv,sample_submission.csv}", "id,label\n1001,cat\n")


@source(train=4, val=2, classes=("n01440764", "n01443537"), messages=("test", "Annotations", ".csv"), label_files=2)
def kaggle_imagenet(root: Path) -> None:
    """The ImageNet competition: also has bounding boxes, lists, and test images without labels, which are not used."""
    put_images(root, "ILSVRC/Data/CLS-LOC/train/{n01440764,n01443537}/x_{0,1}.JPEG")
    put_images(root, "ILSVRC/Data/CLS-LOC/{val/ILSVRC2012_val_0000000{1,2},test/ILSVRC2012_test_0000000{1,2}}.JPEG")
    put_files(root, "ILSVRC/Annotations/CLS-LOC/train/n01440764/x_0.xml", "<annotation/>")
    put_files(root, "ILSVRC/ImageSets/CLS-LOC/{train_cls,val,test}.txt", "x_0 1\n")
    put_files(root, "LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    labels = "ILSVRC2012_val_00000001,n01440764 1 2 3 4\nILSVRC2012_val_00000002,n01443537 1 2 3 4\n"
    put_files(root, "LOC_{val_solution,train_solution,sample_submission}.csv", f"ImageId,PredictionString\n{labels}")


@source(error=("class",))
def kaggle_dogs_vs_cats(root: Path) -> None:
    """The class is only in the file name."""
    put_images(root, "train/{cat,dog}.{0,1,2}.jpg")
    put_images(root, "test1/{1,2}.jpg")


@source(train=6, test=3, classes=INTEL, messages=("seg_pred",), error=("seg_pred",))
def kaggle_intel_scenes(root: Path) -> None:
    """Each split folder is nested in a folder of the same name; a third folder has no classes."""
    put_images(root, "seg_train/seg_train/{buildings,forest,sea}/{1,2}.jpg")
    put_images(root, "seg_test/seg_test/{buildings,forest,sea}/3.jpg")
    put_images(root, "seg_pred/seg_pred/{4,5,6}.jpg")


PLANTS = (
    "Cherry_(including_sour)___healthy",
    "Corn_(maize)___Common_rust_",
    "Pepper,_bell___Bacterial_spot",
    "Tomato___Spider_mites Two-spotted_spider_mite",
)


@source(train=8, val=4, classes=PLANTS, messages=("test",), error=("test",))
def kaggle_plant_diseases(root: Path) -> None:
    """Two wrapper folders of the same name; class names with punctuation and spaces; test images in test/test/."""
    wrapper = "New Plant Diseases Dataset(Augmented)/" * 2
    for name in PLANTS:
        put_files(root, f"{wrapper}train/{name}/a.JPG", images.jpeg(len(name)))
        put_files(root, f"{wrapper}train/{name}/b c (1).JPG", images.jpeg(100 + len(name)))
        put_files(root, f"{wrapper}valid/{name}/c.JPG", images.jpeg(200 + len(name)))
    put_images(root, "test/test/{AppleCedarRust1,PotatoHealthy1,PotatoHealthy2}.JPG")


@source(error=("class|csv",), images=({"train": 6},), notes=(ONE_CLASS,), messages=(".csv",))
def labels_in_a_csv(root: Path) -> None:
    """All images are in one folder and the labels in a list: must not silently become a set with one class."""
    put_images(root, "images/{1,2,3,4,5,6}.jpg")
    put_files(root, "labels.csv", "image,label\n1.jpg,cat\n2.jpg,dog\n")


@source(error=("class",))
def flat_images(root: Path) -> None:
    """There are no folders."""
    put_images(root, "{cat1,cat2,dog1,dog2}.jpg")


@source(train=6, test=2, classes=("cat", "dog"), messages=(".md", ".csv", ".git", ".cache"))
def hugging_face_image_folder(root: Path) -> None:
    """Downloaded by `hf download` or git: captions in metadata.csv, a README, and caches."""
    put_images(root, "{train/{cat,dog}/{1,2,3},test/{cat,dog}/4}.jpg")
    put_files(root, "train/metadata.csv", "file_name,text\ncat/1.jpg,a cat\n")
    put_files(root, "{README.md,.gitattributes,.git/HEAD,.git/objects/pack/pack-1.idx}", "text")
    put_files(root, ".cache/huggingface/download/train/cat/{1,2,3}.jpg.metadata", "etag")


@source(error=("class|csv|jsonl",))
def hugging_face_metadata_labels(root: Path) -> None:
    """The labels are in metadata.jsonl, and there are no class folders."""
    put_images(root, "{train/{1,2,3},test/4}.png", images.in_format("PNG"))
    put_files(root, "{train,test}/metadata.jsonl", '{"file_name": "1.png", "label": "cat"}\n')


@source(error=(".arrow",))
def hugging_face_save_to_disk(root: Path) -> None:
    """Arrow files are not Parquet files; the error must mention them."""
    put_files(root, "{train,test}/data-00000-of-00001.arrow", b"ARROW1" + bytes(100))
    put_files(root, "{dataset_dict.json,train/state.json,train/dataset_info.json,test/state.json}", "{}")


@source(train=6, val=2, test=4, classes=("corn", "weed"), messages=(".txt",))
def roboflow_classification(root: Path) -> None:
    """valid/ is the validation split; there are also a test split and README files."""
    put_images(root, "{train/{corn,weed}/{1,2,3},valid/{corn,weed}/4,test/{corn,weed}/{5,6}}_jpg.rf.0a1b.jpg")
    put_files(root, "README.{roboflow,dataset}.txt", "Exported by roboflow.com")


@source(error=("class",))
def yolo_detection(root: Path) -> None:
    """Detection: images/ and labels/ are not classes, and the advice must not be to remove one of them."""
    put_images(root, "images/{train/{1,2},val/3}.jpg")
    put_files(root, "labels/{train/{1,2},val/3}.txt", "0 .5 .5 .2 .2\n")
    put_files(root, "data.yaml", "nc: 2\nnames: [cat, dog]\n")


@source(error=("jpegimages|annotations|imagesets",))
def voc_detection(root: Path) -> None:
    """Pascal VOC: folders of images, masks, boxes, and lists, none of which is a class."""
    put_images(root, "JPEGImages/2007_00000{1,2,3}.jpg")
    put_images(root, "SegmentationClass/2007_00000{1,2,3}.png", images.in_format("PNG"))
    put_files(root, "Annotations/2007_00000{1,2,3}.xml", "<annotation/>")
    put_files(root, "ImageSets/Main/{train,val}.txt", "2007_000001\n")


@source(error=("train2017|class",))
def coco_images(root: Path) -> None:
    """Two folders of images and one of boxes: none of them is a class."""
    put_images(root, "{train2017/0000{1,2,3},val2017/0000{4,5}}.jpg")
    put_files(root, "annotations/instances_{train,val}2017.json", "{}")


@source(error=("class",))
def label_studio_export(root: Path) -> None:
    """Exports of Label Studio and CVAT store the labels in a list next to the images."""
    put_images(root, "images/0a1b-IMG_{1,2,3}.jpg")
    put_files(root, "labels/0a1b-IMG_{1,2,3}.txt", "0 .5 .5 1 1\n")
    put_files(root, "{classes.txt,notes.json,result.json}", "cat\ndog\n")


@source(
    images=({"train": 6}, {"train": 6, "val": 2}),
    classes=("n01443537", "n01629819"),
    messages=("val", ".txt"),
    error=("val",),
    label_files=3,
)
def tiny_imagenet(root: Path) -> None:
    """The validation labels are in a list; val/images and test/images are not classes."""
    put_images(root, "tiny-imagenet-200/train/{n01443537,n01629819}/images/x_{0,1,2}.JPEG")
    put_files(root, "tiny-imagenet-200/train/{n01443537,n01629819}/boxes.txt", "x_0.JPEG\t0\t0\t9\t9\n")
    put_images(root, "tiny-imagenet-200/val/images/val_{0,1}.JPEG")
    put_files(
        root,
        "tiny-imagenet-200/val/val_annotations.txt",
        "val_0.JPEG\tn01443537\t0\t0\t9\t9\nval_1.JPEG\tn01629819\t0\t0\t9\t9\n",
    )
    put_images(root, "tiny-imagenet-200/test/images/test_{0,1,2}.JPEG")
    put_files(root, "tiny-imagenet-200/{wnids,words}.txt", "n01443537\tgoldfish\nn01629819\tsalamander\n")


BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross")


@source(train=6, classes=BIRDS, messages=("parts", "train_test_split"), error=("attributes|parts|images/",))
def cub_birds(root: Path) -> None:
    """The class folders are in images/; the folders next to it contain lists."""
    put_images(root, f"images/{{{','.join(BIRDS)}}}/{{1,2,3}}.jpg")
    put_files(root, "{attributes/attributes,parts/part_locs,classes,train_test_split}.txt", "1 1\n")


@source(error=("class",), images=({"train": 4},), notes=(ONE_CLASS,), messages=(".mat",))
def oxford_flowers(root: Path) -> None:
    """All images are in jpg/; labels and splits are in MATLAB files."""
    put_images(root, "jpg/image_0000{1,2,3,4}.jpg")
    put_files(root, "{imagelabels,setid}.mat", b"MATLAB 5.0 MAT-file" + bytes(200))


@source(train=10, test=10, classes=tuple("0123456789"), messages=("readme",))
def mnist_as_png(root: Path) -> None:
    """A wrapper folder around training/ and testing/ with digits as classes."""
    digit = "{0,1,2,3,4,5,6,7,8,9}"
    put_images(root, f"mnist_png/{{training/{digit}/1,testing/{digit}/2}}.png", images.in_format("PNG"))
    put_files(root, "mnist_png/README", "digits")


@source(train=3, test=4, classes=("broken_large", "good"), notes=("broken_large",), messages=("ground_truth", ".txt"))
def mvtec_anomalies(root: Path) -> None:
    """Defects occur only in the test split, and their masks are not images of a class."""
    put_images(root, "{train/good/00{0,1,2},test/{good,broken_large}/00{3,4}}.png", images.in_format("PNG"))
    put_images(root, "ground_truth/broken_large/00{3,4}_mask.png", images.in_format("PNG"))
    put_files(root, "{license,readme}.txt", "CC BY-NC-SA")


@source(train=4, test=4, classes=("apple", "pear"), error=("test",))
def splits_below_the_classes(root: Path) -> None:
    """CLASS/train and CLASS/test: the test images must not silently be used for training."""
    put_images(root, "{apple,pear}/{train,test}/{1,2}.jpg")


@source(train=4, val=2, test=2, classes=("cat", "dog"))
def splits_in_full_words(root: Path) -> None:
    """Training/, Validation/, and Testing/."""
    put_images(root, "{Training/{cat,dog}/{1,2},Validation/{cat,dog}/3,Testing/{cat,dog}/4}.jpg")


@source(train=4, val=2, test=2, classes=("cat", "dog"))
def splits_with_suffix_set(root: Path) -> None:
    """train_set/, val_set/, and test_set/."""
    put_images(root, "{train_set/{cat,dog}/{1,2},val_set/{cat,dog}/3,test_set/{cat,dog}/4}.jpg")


@source(train=8, classes=("alpine", "testimonials", "trainers", "valley"))
def classes_that_begin_like_splits(root: Path) -> None:
    """Class names that begin like splits, such as valley and trainers, are not splits."""
    put_images(root, "{alpine,valley,trainers,testimonials}/{1,2}.jpg")


@source(error=(".zip",))
def archives_not_unpacked(root: Path) -> None:
    """One zip per class: the error must say to unpack them, or the classes must be read."""
    put_files(root, "{cat,dog}.zip", b"PK\3\4" + bytes(100))


@source(error=("cifar|batch",))
def cifar_pickles(root: Path) -> None:
    """CIFAR-10 as Python pickles."""
    put_files(root, "cifar-10-batches-py/{batches.meta,data_batch_1,test_batch}", b"\x80\2}q" + bytes(100))
    put_files(root, "cifar-10-batches-py/readme.html", "<html></html>")
