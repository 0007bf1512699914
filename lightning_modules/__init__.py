"""The systems of the five case studies, one per file."""


def import_all() -> None:
    """Import every system, so that ``--model NAME`` finds it by its short name."""
    import lightning_modules.classification.attributes
    import lightning_modules.classification.emotion
    import lightning_modules.classification.image_classifier
    import lightning_modules.detection.fast_rcnn
    import lightning_modules.detection.faster_rcnn
    import lightning_modules.detection.overfeat
    import lightning_modules.detection.rcnn
    import lightning_modules.detection.rpn
    import lightning_modules.detection.sliding_window
    import lightning_modules.detection.ssd
    import lightning_modules.detection.yolo_v1
    import lightning_modules.detection.yolo_v2
    import lightning_modules.pose.deeppose
    import lightning_modules.pose.keypoint_rcnn
    import lightning_modules.pose.orientation
    import lightning_modules.pose.stacked_hourglass
    import lightning_modules.segmentation.deconvnet
    import lightning_modules.segmentation.deeplab
    import lightning_modules.segmentation.deeplab_v3
    import lightning_modules.segmentation.encoder_decoder
    import lightning_modules.segmentation.fcn
    import lightning_modules.segmentation.mask_rcnn
    import lightning_modules.segmentation.patch_classifier
    import lightning_modules.style.adain
    import lightning_modules.style.fast_style
    import lightning_modules.style.feature_inversion
    import lightning_modules.style.inversion_network
    import lightning_modules.style.neural_style
    import lightning_modules.style.style_prediction
    import lightning_modules.style.texture_synthesis  # noqa: F401
