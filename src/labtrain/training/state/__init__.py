"""What a step or a training changes, beside weights: found, undone, kept and put back."""
