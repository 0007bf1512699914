"""Datamodules of the five case studies: one per dataset, in the layout in which it is published."""


def import_all() -> None:
    """Import every datamodule, so that ``--data NAME`` finds it by its class name."""
    import datamodules.classification.fer2013
    import datamodules.classification.food101
    import datamodules.classification.image_folder
    import datamodules.classification.imagenet
    import datamodules.classification.places365
    import datamodules.classification.yummly
    import datamodules.detection.voc
    import datamodules.pose.lsp
    import datamodules.pose.mpii
    import datamodules.pose.rendered_solids
    import datamodules.segmentation.instance_crops
    import datamodules.segmentation.voc_instance
    import datamodules.segmentation.voc_semantic
    import datamodules.style.style_images  # noqa: F401
