from .attention_heads import (
    class_attention as class_attention,
    draw_attention_heads as draw_attention_heads,
    head_masses as head_masses,
    tissue_parts as tissue_parts,
)
from .cells_page import write_cells_page as write_cells_page
from .cohort_page import write_cohort_page as write_cohort_page
from .curves_mil import (
    plot_confusion_matrix as plot_confusion_matrix,
    plot_few_shot as plot_few_shot,
    plot_roc as plot_roc,
)
from .gallery import GalleryTile as GalleryTile, draw_gallery as draw_gallery, outline_nuclei as outline_nuclei
from .geojson import write_geojson as write_geojson
from .heatmap import TileMap as TileMap, tile_map as tile_map, write_heatmap_tiff as write_heatmap_tiff
from .nifti import write_nifti as write_nifti
from .overlay import draw_overlay as draw_overlay
from .report_page import SlideReport as SlideReport, write_report as write_report

__all__ = [
    "GalleryTile",
    "SlideReport",
    "TileMap",
    "class_attention",
    "draw_attention_heads",
    "draw_gallery",
    "draw_overlay",
    "head_masses",
    "outline_nuclei",
    "plot_confusion_matrix",
    "plot_few_shot",
    "plot_roc",
    "tile_map",
    "tissue_parts",
    "write_cells_page",
    "write_cohort_page",
    "write_geojson",
    "write_heatmap_tiff",
    "write_nifti",
    "write_report",
]
