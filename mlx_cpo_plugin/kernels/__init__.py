"""What a training pass consists of, compiled for the processor at hand: operations of MLX written in C++."""
