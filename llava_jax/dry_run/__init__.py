"""The cost of a step on devices that are not attached, read from their compiler."""
