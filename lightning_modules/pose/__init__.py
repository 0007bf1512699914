"""Poses: orientation of rigid bodies, DeepPose, Stacked Hourglass, Keypoint R-CNN; what they share."""
