"""What everything else stands on: errors, files, processes, and the table of methods. No llama.cpp in it."""
