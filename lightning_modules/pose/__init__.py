"""Pose estimation: orientation of rigid bodies, DeepPose, Stacked Hourglass, Keypoint R-CNN."""
