"""The bundled demonstration: a small base model, a task with an exact answer, and the measure of before and after."""
