"""What everything rests on: files, processes, signals, messages. Imports no other room."""
