# Imported targets: xccl::xccl (shared) and xccl::static. All paths follow from where this file lies.
get_filename_component(_xccl_prefix "${CMAKE_CURRENT_LIST_DIR}/@UP_FROM_CMAKE@" ABSOLUTE)

if(NOT TARGET xccl::xccl)
  add_library(xccl::xccl SHARED IMPORTED)
  set_target_properties(xccl::xccl PROPERTIES
    IMPORTED_LOCATION "${_xccl_prefix}/@LIBDIR@/@SHARED_FILE@"
    IMPORTED_SONAME "@SONAME@"
    INTERFACE_INCLUDE_DIRECTORIES "${_xccl_prefix}/include")
endif()

if(NOT TARGET xccl::static)
  add_library(xccl::static STATIC IMPORTED)
  set_target_properties(xccl::static PROPERTIES
    IMPORTED_LOCATION "${_xccl_prefix}/@LIBDIR@/libxccl.a"
    INTERFACE_INCLUDE_DIRECTORIES "${_xccl_prefix}/include"
    INTERFACE_LINK_LIBRARIES "@PRIVATE_LIBS_CMAKE@")
endif()

set(xccl_FOUND TRUE)
unset(_xccl_prefix)
