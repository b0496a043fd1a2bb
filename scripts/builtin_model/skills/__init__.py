"""The skills: each module makes dialogues of one group, functions of a `World` alone."""
