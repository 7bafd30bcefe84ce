{{- define "lora-serve.name" -}}
{{ .Values.nameOverride | default .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "lora-serve.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "lora-serve.labels" -}}
{{ include "lora-serve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- /* Options as given; without any, the demo's. */}}
{{- define "lora-serve.base" -}}
{{- $demo := dict "model" "/opt/demo/model" "served_model_name" "demo" "adapters" "/opt/demo/adapters" }}
{{- .Values.options | default $demo | toYaml }}
{{- end }}

{{- /* URL of the store that replicas share; empty without one. */}}
{{- define "lora-serve.sharedStore" -}}
{{- if .Values.sharedStore.claim }}
{{- if .Values.sharedStore.url }}
{{- fail "sharedStore: give url or claim, not both" }}
{{- end }}
{{- print "file:///shared" }}
{{- else }}
{{- .Values.sharedStore.url }}
{{- end }}
{{- end }}

{{- /* Whether /data is a claim. */}}
{{- define "lora-serve.persistent" -}}
{{- if and .Values.persistence.enabled (not (include "lora-serve.sharedStore" .)) }}yes{{ end }}
{{- end }}

{{- /* The file that --config names. */}}
{{- define "lora-serve.options" -}}
{{- $fixed := dict "host" "0.0.0.0" "port" .Values.port "drain_timeout" .Values.drain.timeout }}
{{- if .Values.keys.secret }}
{{- $_ := set $fixed "api_key_file" "/etc/lora-serve/keys/keys.yaml" }}
{{- else if .Values.insecure }}
{{- $_ := set $fixed "insecure" true }}
{{- else }}
{{- fail "keys.secret: name a Secret with keys, or say insecure: true" }}
{{- end }}
{{- with include "lora-serve.sharedStore" . }}
{{- $_ := set $fixed "shared_store" . }}
{{- end }}
{{- merge $fixed (include "lora-serve.base" . | fromYaml) | toYaml }}
{{- end }}
