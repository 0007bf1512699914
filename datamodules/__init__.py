"""The data of the five case studies: one datamodule a dataset, in the layout in which it is published."""


def import_all() -> None:
    """Imports every datamodule, so that ``--data NAME`` finds it by its short name."""
    import datamodules.fer2013
    import datamodules.food101
    import datamodules.image_folder
    import datamodules.imagenet
    import datamodules.instance_crops
    import datamodules.lsp
    import datamodules.mpii
    import datamodules.places365
    import datamodules.segmentation
    import datamodules.solids
    import datamodules.style_images
    import datamodules.voc
    import datamodules.yummly  # noqa: F401
