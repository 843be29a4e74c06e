{{/* Name of the release's objects: `kubetune`, or `<release>-kubetune` for a release whose name does not say it. */}}
{{- define "kubetune.name" -}}
{{- $name := ternary .Release.Name (printf "%s-kubetune" .Release.Name) (contains "kubetune" .Release.Name) -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* Name of objects that have no namespace: two releases may have the same name in two namespaces. */}}
{{- define "kubetune.clusterName" -}}
{{ include "kubetune.name" . }}-{{ .Release.Namespace }}
{{- end }}

{{- define "kubetune.progressName" -}}
{{ include "kubetune.name" . }}-progress
{{- end }}

{{- define "kubetune.tlsSecret" -}}
{{ .Values.progress.existingSecret | default (printf "%s-tls" (include "kubetune.progressName" .)) }}
{{- end }}

{{- define "kubetune.selector" -}}
app.kubernetes.io/name: kubetune
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "kubetune.labels" -}}
{{ include "kubetune.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* The reference of an image: (list $ .Values.image) */}}
{{- define "kubetune.image" -}}
{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default (index . 0).Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* How the workers' tokens are checked. Only a release for all namespaces may have them reviewed unasked. */}}
{{- define "kubetune.progressAuth" -}}
{{ .Values.progress.auth | default (ternary "TokenReview" "KeySet" (empty .Values.watchNamespace)) }}
{{- end }}

{{/* A setting as a variable's value: lists are separated by commas. */}}
{{- define "kubetune.setting" -}}
{{ kindIs "slice" . | ternary (join "," .) (toString .) }}
{{- end }}
