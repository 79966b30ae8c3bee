"""`pipeline race`: the time that training needs to reach an accuracy, over several seeds."""
