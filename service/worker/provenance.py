"""What an image file says about its own origin: that a model drew it, and which one. Never the prompt.

The property names are IPTC's (Photo Metadata Standard 2025.1, XMP namespace Iptc4xmpExt).
"""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import quoteattr

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:Iptc4xmpExt="{iptc}"
   xmp:CreatorTool="fewstep" Iptc4xmpExt:DigitalSourceType="{source_type}"
   Iptc4xmpExt:AISystemUsed={model} Iptc4xmpExt:AISystemVersionUsed={version}/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


@dataclass(frozen=True)
class Provenance:
    """The model that drew an image."""

    model: str
    version: str

    def xmp(self) -> bytes:
        """An XMP packet that says so."""
        model, version = quoteattr(self.model), quoteattr(self.version)
        return PACKET.format(iptc=IPTC, source_type=SOURCE_TYPE, model=model, version=version).encode("utf-8")
