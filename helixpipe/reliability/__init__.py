"""What a job says when something goes wrong, and how it ends. Imports neither plans nor Megatron."""
