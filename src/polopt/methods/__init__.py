"""Published methods, one file each, in the room of the slot they are about."""
