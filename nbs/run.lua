-- At the top of every chapter: how to run it. Quarto and tools/site.py both apply this to the notebooks' pages.
local repository = "https://github.com/pnpda/pnpda_nb/blob/main/nbs/"

function Pandoc(document)
  local given = document.meta.notebook  -- tools/site.py says which notebook the page is of, Quarto which file it reads
  local name = given and pandoc.utils.stringify(given) or (quarto and quarto.doc.input_file or ""):match("[^/\\]+$")
  if not name or not name:match("^%d.*%.ipynb$") then return nil end
  local command = pandoc.CodeBlock("jupyter lab nbs/" .. name, pandoc.Attr("", {"sh"}))
  local link = pandoc.Link(name, (given and "" or repository) .. name, "", pandoc.Attr("", {}, given and {download = ""} or {}))
  local words = pandoc.Plain({pandoc.Str("Run"), pandoc.Space(), pandoc.Str("this"), pandoc.Space(), pandoc.Str("chapter")})
  local download = pandoc.Plain({pandoc.Str("or"), pandoc.Space(), pandoc.Str("download"), pandoc.Space(), link})
  document.blocks:insert(1, pandoc.Div({words, command, download}, pandoc.Attr("", {"run-chapter"})))
  return document
end
