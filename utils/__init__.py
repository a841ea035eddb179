"""What the scripts are made of, in rooms; imports run downwards only (tests/test_rooms.py has the order)."""
