"""Parts of a MONAI Deploy application; they work, and are imported, without its SDK as well."""
