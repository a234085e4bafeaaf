"""What a step costs on devices that are not attached, read from their compiler."""
