# cmake -DOUTPUT=file.cpp -DINPUTS=a|b -P embed_files.cmake: writes the definition of huggingface_files() (embedded_files.h).
string(REPLACE "|" ";" inputs "${INPUTS}")
set(arrays "")
set(entries "")
set(i 0)
foreach(input IN LISTS inputs)
  get_filename_component(name "${input}" NAME)
  file(READ "${input}" hex HEX)
  string(REGEX REPLACE "(................................)" "\\1\n" hex "${hex}")
  string(REGEX REPLACE "([0-9a-f][0-9a-f])" "'\\\\x\\1'," bytes "${hex}")
  string(APPEND arrays "constexpr char file_${i}[] = {\n${bytes}'\\0'};\n")
  string(APPEND entries "    {\"${name}\", {file_${i}, sizeof file_${i} - 1}},\n")
  math(EXPR i "${i} + 1")
endforeach()
file(WRITE "${OUTPUT}" "#include \"checkpoints/embedded_files.h\"

namespace deltapipe {
namespace {
${arrays}
constexpr EmbeddedFile files[] = {
${entries}};
}  // namespace

std::span<const EmbeddedFile> huggingface_files() { return files; }

}  // namespace deltapipe
")
