"""One module for each thing that a person does; here packages are composed."""
