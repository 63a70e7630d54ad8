"""Images: the networks and augmentations on which SSQL was published."""
