"""What a rank tells about itself: state, steps, memory."""
