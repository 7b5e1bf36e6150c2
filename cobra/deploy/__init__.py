"""What happens to adapters after training: the planner's choice of merged, packed or padded, and packed serving."""
